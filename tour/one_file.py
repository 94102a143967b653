"""QLoRA in one file: from a chat to a trained adapter, with nothing but PyTorch between the weights and the loss.

    python tour/one_file.py                     the demo's model and data, 20 steps on a CPU, then an answer
    python tour/one_file.py MODEL DATA STEPS    a folder with config.json or a .gguf file; chats as JSON lines

Read it from top to bottom: text to ids, four bits, LoRA, the model, the data, the loop. It is slow, uses one process
and keeps everything in memory. The package `nanoqlora` is the same, faster, larger and safer: `train.py`, with its
reference operations, has the same loss and the same gradient norm at every step. With bitsandbytes' kernels the losses
differ by 1e-4 of their size, because these round one scale of a thousand to the next level.

Shapes: B rows of T tokens, D width, H query heads of hd dimensions, KV key/value heads, V vocabulary, r LoRA rank.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jinja2
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Settings:
    """The demo's, by the names of its train.yml."""

    base_model: str = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "data/pirate.jsonl"
    sequence_len: int = 512
    lora_r: int = 16
    lora_alpha: float = 32.0
    micro_batch_size: int = 2
    num_epochs: int = 2
    max_steps: int = 20
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42


# 1. Text to ids ------------------------------------------------------------------------------------------------------


def byte_letters() -> list[str]:
    """Vocabulary files spell each byte as one printable character: itself, or one from U+0100 on."""
    letters, spare = [], 0x100
    for byte in range(256):
        prints = 0x21 <= byte <= 0x7E or (0xA1 <= byte and byte != 0xAD)
        letters.append(chr(byte if prints else spare))
        spare += not prints
    return letters


class Tokenizer:
    """Byte-pair encoding: start from bytes, and join the two neighbours that were learnt first, until none are left."""

    WORDS = r"\p{N}|'(?:[sdmt]|re|ve|ll)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"  # SmolLM's words

    def __init__(self, vocab: list[str], merges: list[str], special: list[str], template: str, end: str) -> None:
        """special: texts that are one token, such as <|im_start|>. template: Jinja, from messages to text."""
        self.vocab, self.ids = vocab, {piece: i for i, piece in enumerate(vocab)}
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        self.template = jinja2.Template(template, keep_trailing_newline=True)
        self.letters, self.end = byte_letters(), end

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and where each token ends in the text, in bytes."""
        ids, ends = [], []
        for part in self.special.split(text):
            is_special = self.special.fullmatch(part) is not None
            for word in [part] if is_special else regex.findall(self.WORDS, part):
                for piece in [word] if is_special else self.merge(word):
                    ids.append(self.ids[piece])
                    size = len(part.encode()) if is_special else len(piece)  # a letter of a piece is a byte
                    ends.append((ends[-1] if ends else 0) + size)
        return ids, ends

    def merge(self, word: str) -> list[str]:
        pieces = [self.letters[byte] for byte in word.encode()]
        while True:
            pairs = [(self.rank.get(pair, math.inf), i) for i, pair in enumerate(pairwise(pieces))]
            first, i = min(pairs, default=(math.inf, 0))
            if first == math.inf:
                return pieces
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]

    def decode(self, ids: list[int]) -> str:
        byte = {letter: i for i, letter in enumerate(self.letters)}
        return bytes(byte[letter] for i in ids for letter in self.vocab[i]).decode(errors="replace")

    def text(self, messages: list[dict], ask: bool = False) -> str:
        return self.template.render(messages=messages, add_generation_prompt=ask)

    def sample(self, messages: list[dict]) -> tuple[Tensor, Tensor]:
        """A chat as tokens (n,), and which of them the model has to learn to write: answers, up to their end token."""
        text, spans = self.text(messages), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(self.text(messages[:i], ask=True).encode())
                rest = text.encode()[start:].decode()
                spans.append((start, start + len(rest[: rest.index(self.end) + len(self.end)].encode())))
        ids, ends = self.encode(text)
        starts = [0, *ends[:-1]]
        supervised = [any(a <= s and e <= b for a, b in spans) for s, e in zip(starts, ends, strict=True)]
        return torch.tensor(ids), torch.tensor(supervised)


# 2. Four bits --------------------------------------------------------------------------------------------------------

# The 16 levels of NormalFloat: quantiles of a normal distribution, scaled to [-1, 1].
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
TWO_LEVELS = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), 1)  # (256, 2), the levels of a byte's two codes


def scale_levels() -> Tensor:
    """The 256 levels of the scales: in each decade below 1 twice as many as in the next smaller one."""
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6))
    positive = torch.cat(decades)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest level of each value, uint8."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


class FourBits:
    """A matrix (n_out, n_in) in 4.127 bits a weight.

    64 neighbours of a row share a scale, their largest magnitude, and each becomes the number of the nearest level. The
    scales, less their mean, are rounded to 8 bits in the same way, 256 at a time.
    """

    def __init__(self, w: Tensor) -> None:
        groups = w.float().view(-1, 64)
        absmax = groups.abs().amax(1)
        codes = nearest(groups / torch.where(absmax == 0, 1.0, absmax)[:, None], NF4).view(-1, 2)
        self.packed = codes[:, 0] << 4 | codes[:, 1]  # two codes in a byte
        self.mean = absmax.mean()
        scales = F.pad(absmax - self.mean, (0, -len(absmax) % 256)).view(-1, 256)
        self.nested = scales.abs().amax(1)
        self.absmax_codes = nearest(scales / torch.where(self.nested == 0, 1.0, self.nested)[:, None], scale_levels())
        self.shape, self.levels = w.shape, scale_levels()

    def dequantize(self) -> Tensor:
        absmax = self.levels[self.absmax_codes.int()] * self.nested[:, None] + self.mean
        w = TWO_LEVELS[self.packed.int()].view(-1, 64)  # groups
        return (w * absmax.flatten()[: len(w), None]).view(self.shape)


# 3. LoRA over four bits ----------------------------------------------------------------------------------------------


class FrozenMatmul(torch.autograd.Function):
    """x W^T. W is dequantized for each matmul and dropped after it, so autograd must not keep it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: FourBits) -> Tensor:
        ctx.w = w
        return x @ w.dequantize().t()

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.w.dequantize(), None  # W has no gradient


class QLoRALinear(nn.Module):
    """y = x W^T + s (x A^T) B^T. W (n_out, n_in) is frozen in 4 bits; A (r, n_in) and B (n_out, r) are trained."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w, (self.n_out, self.n_in) = FourBits(w), w.shape

    def add_lora(self, r: int, alpha: float) -> None:
        """B starts at zero, so the model starts as it was."""
        bound = 1 / math.sqrt(self.n_in)
        self.lora_A = nn.Parameter(torch.empty(r, self.n_in).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(self.n_out, r))
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return FrozenMatmul.apply(x, self.w) + self.scaling * (x @ self.lora_A.t()) @ self.lora_B.t()


# 4. Llama-3 ----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE: the pair of dimensions (i, i + hd / 2) of every head turns by its token's angle. x: (B, T, heads, hd)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]  # (B, T, 1, hd / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Llama(nn.Module):
    """Token ids to the hidden states that the head reads. Names and shapes are those of the checkpoint."""

    def __init__(self, config: dict, load) -> None:
        super().__init__()
        self.H, self.KV, self.eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
        self.hd = config.get("head_dim") or config["hidden_size"] // self.H
        self.embed = load("model.embed_tokens.weight").float()
        self.head = self.embed if config.get("tie_word_embeddings") else load("lm_head.weight").float()
        self.norm = load("model.norm.weight").float()
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.frequencies = 1 / theta ** (torch.arange(0, self.hd, 2) / self.hd)
        self.layers, self.norms = nn.ModuleList(), []
        for i in range(config["num_hidden_layers"]):
            name = f"model.layers.{i}."
            parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
            linears = {part.split(".")[1]: QLoRALinear(load(name + part + ".weight")) for part in parts}
            self.layers.append(nn.ModuleDict(linears))
            kinds = "input_layernorm", "post_attention_layernorm"
            self.norms.append([load(f"{name}{kind}.weight").float() for kind in kinds])

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """tokens (B, T), documents (B, T): the number of the chat that each belongs to -> (B, T, D)."""
        B, T = tokens.shape
        same = documents[:, :, None] == documents[:, None, :]  # (B, T, T): a token sees its own chat,
        mask = (same & torch.ones(T, T).tril().bool())[:, None]  # and nothing that comes after it
        positions = same.tril().sum(-1) - 1  # (B, T), counted within a chat
        angles = positions[..., None] * self.frequencies
        x = self.embed[tokens]
        for layer, (norm_1, norm_2) in zip(self.layers, self.norms, strict=True):
            h = rms_norm(x, norm_1, self.eps)
            q = rotate(layer["q_proj"](h).view(B, T, self.H, self.hd), angles)
            k = rotate(layer["k_proj"](h).view(B, T, self.KV, self.hd), angles)
            v = layer["v_proj"](h).view(B, T, self.KV, self.hd)
            k, v = (t.repeat_interleave(self.H // self.KV, dim=2) for t in (k, v))  # H / KV queries share a key
            scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.hd)
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            y = torch.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, -1)
            x = x + layer["o_proj"](y)
            h = rms_norm(x, norm_2, self.eps)
            x = x + layer["down_proj"](F.silu(layer["gate_proj"](h)) * layer["up_proj"](h))
        return rms_norm(x, self.norm, self.eps)


def open_model(path: str) -> tuple[dict, object, Tokenizer]:
    """Its configuration, a function from the name of a tensor to the tensor, and its tokenizer."""
    if path.endswith(".gguf"):  # the container is another lesson: `nanoqlora/gguf/reader.py`
        from nanoqlora.tokenizer.tokenizer import load_tokenizer
        from nanoqlora.weights.checkpoint import open_weights

        weights, t = open_weights(path), load_tokenizer(path)
        end = t.vocab[t.eos_id]
        return weights.config, weights.load, Tokenizer(t.vocab, t.merges, [*t.special_tokens], t.chat_template, end)
    from safetensors import safe_open

    folder = Path(path)
    config, tokenizer, named = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer", "tokenizer_config")
    )
    tensors = safe_open(folder / "model.safetensors", "pt")
    added = [token["content"] for token in tokenizer["added_tokens"]]
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    vocab = sorted(ids, key=ids.__getitem__)
    return config, tensors.get_tensor, Tokenizer(vocab, merges, added, named["chat_template"], named["eos_token"])


# 5. Chats to rows ----------------------------------------------------------------------------------------------------


def pack(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Chats into rows of at most `capacity` tokens: the longest first, each into the fullest row that has the space."""
    rows, space = [], []
    for i in sorted(order, key=lambda i: -lengths[i]):
        fits = [row for row, free in enumerate(space) if free >= lengths[i]]
        row = min(fits, key=lambda row: space[row], default=len(rows))
        if row == len(rows):
            rows.append([])
            space.append(capacity)
        rows[row].append(i)
        space[row] -= lengths[i]
    return rows


def steps_of_run(lengths: list[int], s: Settings) -> list[list[list[int]]]:
    """For each step its rows, each a list of chats; every epoch in another order."""
    steps, epoch = [], 0
    while len(steps) < s.max_steps or epoch < s.num_epochs:
        rng, order = random.Random(f"{s.seed} {epoch}"), list(range(len(lengths)))
        rng.shuffle(order)
        rows = pack(lengths, order, s.sequence_len)
        rng.shuffle(rows)
        steps += [rows[i : i + s.micro_batch_size] for i in range(0, len(rows), s.micro_batch_size)]
        epoch += 1
    return steps[: s.max_steps]


def collate(rows: list[list[int]], samples: list[tuple[Tensor, Tensor]], T: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, documents and targets, (B, T) each. A target is the next token, or -100 where nothing is to be learnt."""
    tokens, documents, targets = (torch.full((len(rows), T), value) for value in (0, -1, -100))
    for b, row in enumerate(rows):
        end = 0
        for number, i in enumerate(row):
            ids, supervised = samples[i]
            start, end = end, end + len(ids)
            tokens[b, start:end], documents[b, start:end] = ids, number
            targets[b, start : end - 1] = torch.where(supervised[1:], ids[1:], -100)
    return tokens, documents, targets


# 6. The loop ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, num_steps: int, s: Settings) -> float:
    """Up from 0 to the peak in a straight line, then down to 0 along half a cosine wave."""
    warmup = math.ceil(s.warmup_ratio * num_steps)
    if step < warmup:
        return s.learning_rate * step / warmup
    return s.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class AdamW:
    """Each value moves by rate * mean / sqrt(mean square) of its gradients. Both means forget at their own pace."""

    def __init__(self, parameters: list[nn.Parameter], s: Settings) -> None:
        self.parameters, self.s, self.t = parameters, s, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.t += 1
        b1, b2 = self.s.adam_beta1, self.s.adam_beta2
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.lerp_(p.grad, 1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            mean, square = m / (1 - b1**self.t), v / (1 - b2**self.t)  # both began at 0
            p -= rate * mean / (square.sqrt() + self.s.adam_epsilon)


def train(s: Settings, log=print) -> tuple[Llama, Tokenizer]:
    """Train an adapter; `log` gets step, loss, gradient norm and learning rate of every step."""
    config, load, tokenizer = open_model(s.base_model)
    model = Llama(config, load)
    torch.manual_seed(s.seed)
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            layer.add_lora(s.lora_r, s.lora_alpha)
    lines = Path(s.data).read_text("utf-8").splitlines()
    samples = [tokenizer.sample(json.loads(line)["messages"]) for line in lines]
    samples = [sample for sample in samples if len(sample[0]) <= s.sequence_len]  # a longer chat fits in no row
    steps = steps_of_run([len(ids) for ids, _ in samples], s)
    parameters = [*model.parameters()]
    optimizer = AdamW(parameters, s)
    for step, rows in enumerate(steps):
        tokens, documents, targets = collate(rows, samples, s.sequence_len)
        hidden = model(tokens, documents)[targets != -100]  # (supervised tokens, D)
        logits = hidden @ model.head.t()  # (supervised tokens, V)
        loss = F.cross_entropy(logits, targets[targets != -100])  # their mean, in nats
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in parameters]).double().norm().item()
        for p in parameters:
            p.grad *= min(1.0, s.max_grad_norm / (norm + 1e-6))
        rate = learning_rate(step, len(steps), s)
        optimizer.step(rate)
        for p in parameters:
            p.grad = None
        log(step + 1, loss.item(), norm, rate)
    return model, tokenizer


@torch.no_grad()
def answer(model: Llama, tokenizer: Tokenizer, question: str, max_new_tokens: int = 60) -> str:
    """The likeliest next token again and again, until the end token. A cache of keys and values would save time."""
    ids, _ = tokenizer.encode(tokenizer.text([{"role": "user", "content": question}], ask=True))
    start = len(ids)
    while len(ids) < start + max_new_tokens:
        tokens = torch.tensor([ids])
        token = int((model(tokens, torch.zeros_like(tokens))[0, -1] @ model.head.t()).argmax())
        if tokenizer.vocab[token] == tokenizer.end:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


if __name__ == "__main__":
    settings = Settings()
    for field, value in zip(("base_model", "data", "max_steps"), sys.argv[1:], strict=False):
        setattr(settings, field, type(getattr(settings, field))(value))
    trained, its_tokenizer = train(
        settings,
        lambda step, loss, norm, rate: print(
            f"step {step:3}  loss {loss:.6f}  norm {norm:.6f}  lr {rate:.1e}", flush=True
        ),
    )
    print(answer(trained, its_tokenizer, "How do I make tea?"))
