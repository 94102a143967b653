"""The same work as `bench.py` in a plain transformers + PEFT + bitsandbytes loop, to stand beside it.

    python -m tests.peer_loop --model models/SmolLM2-135M-Instruct.Q4_1.gguf [--dtype bfloat16] [--lean]

NF4 with double quantisation on all linear layers of the blocks, LoRA of rank r on all of them, random tokens, every
position supervised, AdamW on the adapter. The model is made ready as PEFT's guide to quantised training does it, with
`prepare_model_for_kbit_training` (no checkpointing: it would only cost time); --lean leaves that call out, so that
norms, embedding and head stay in bfloat16. Prints the median of the steps and one JSON line.
"""

import argparse
import json
import statistics
import time

import peft
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit

import nanoqlora as nq
from nanoqlora.weights.checkpoint import open_weights


def build(path: str, dtype: torch.dtype, r: int, alpha: int, lean: bool) -> peft.PeftModel:
    """The peer's model with the weights of a checkpoint that our reader reads."""
    config = {k: v for k, v in open_weights(path).config.items() if k not in ("architectures", "rope_scaling")}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)
    model.load_state_dict(nq.Llama.from_pretrained(path, dtype=dtype).state_dict(), strict=False)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".layers." in name:
            layer = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                compress_statistics=True,
            )
            layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            model.set_submodule(name, layer)
    if not lean:
        model.is_loaded_in_4bit = True
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--lean", action="store_true", help="norms, embedding and head in 16 bits too")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--sequence_len", type=int, default=256)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_alpha", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = build(args.model, dtype, args.lora_r, args.lora_alpha, args.lean).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(model.config.vocab_size, (args.micro_batch_size, args.sequence_len))
    times = []
    for step in range(args.steps + 2):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            times.append(time.perf_counter() - started)
    median = statistics.median(times)
    peer = f"transformers+peft+bitsandbytes {args.dtype}{' lean' * args.lean}"
    figures = {"peer": peer, "step_ms": round(median * 1e3, 1)}
    figures |= {"step_ms_min": round(min(times) * 1e3, 1), "step_ms_max": round(max(times) * 1e3, 1)}
    print(json.dumps(figures | {"tokens_per_second": round(tokens.numel() / median, 1), "loss": round(loss.item(), 4)}))


if __name__ == "__main__":
    main()
