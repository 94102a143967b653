"""A Hugging Face folder with random weights: `python -m tests.random_folder FOLDER [--model llama3-8b]`

For measuring what begins with reading 16-bit weights: launch, loading, training, merge, export. The tokenizer is
Llama-3's, which `make witnesses` brings.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import GEOMETRIES

SHARD_BYTES = 5 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama3-8b", choices=GEOMETRIES)
    args = parser.parse_args()
    c, device = GEOMETRIES[args.model], "cuda" if torch.cuda.is_available() else "cpu"
    D, FF, heads, kv = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    block = {"self_attn.q_proj": (heads * c.head_dim, D), "self_attn.k_proj": (kv * c.head_dim, D)}
    block |= {"self_attn.v_proj": (kv * c.head_dim, D), "self_attn.o_proj": (D, heads * c.head_dim)}
    block |= {"mlp.gate_proj": (FF, D), "mlp.up_proj": (FF, D), "mlp.down_proj": (D, FF)}
    block |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,)}
    for i in range(c.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, D)

    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        w = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device).mul_(0.02)
        if sum(t.nbytes for t in files[-1].values()) > SHARD_BYTES:
            files.append({})
        files[-1][name] = w.bfloat16().cpu()
    places = {}
    for i, tensors in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        save_file(tensors, args.folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "bos_token_id": 128000,
    }
    config |= {"eos_token_id": 128001, "torch_dtype": "bfloat16"}
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    keys += " max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings"
    config |= {key: getattr(c, key) for key in keys.split()}
    (args.folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy("models/llama-3/tokenizer.model", args.folder)


if __name__ == "__main__":
    main()
