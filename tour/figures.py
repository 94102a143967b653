"""The pictures of the chapters, drawn from the project's own functions and from real runs.

    python -m tour.figures             all of them, into docs/tour
    python -m tour.figures 4 5         only those of some chapters

The same picture has the same bytes: nothing depends on the time or on a random state. What takes longer than a few
seconds was measured by `tour/measure.py` and is read from `tour/measured.json`.
"""

import json
import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanoqlora.model import rope_frequencies
from nanoqlora.ops import Segments, nf4
from tour import one_file
from tour.measure import measured
from tour.recompute import (
    MODEL,
    ROOT,
    SMALL,
    events_of_micro_batch,
    gradient_error,
    llama3_8b,
    memory_settings,
    packed_rows,
    samples,
    weights,
)

INK, MUTED, GRID = "#24292f", "#6e7781", "#e7eaee"
BLUE, ORANGE, GREEN, PURPLE, LIGHT = "#2563a6", "#d9702e", "#3a8a5f", "#7a5aa6", "#cfe0f2"
PICTURES: dict[str, Callable[[], Figure]] = {}
STYLE = {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "tour"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED, "axes.labelcolor": INK}
STYLE |= {
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}


def picture(function: Callable[[], Figure]) -> Callable[[], Figure]:
    """Registers the picture of a chapter: `picture_04_bits` draws docs/tour/04-bits.svg."""
    PICTURES[function.__name__.removeprefix("picture_").replace("_", "-")] = function
    return function


def canvas(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Axes without frame or ticks, whose units are tenths of an inch, for drawings."""
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set(xlim=(0, 10 * width), ylim=(0, 10 * height), aspect="equal", title=title)
    ax.axis("off")
    return figure, ax


# 1. Text to ids to mask ----------------------------------------------------------------------------------------------


@picture
def picture_01_text_ids_mask() -> Figure:
    """A chat of the demo's data as boxes: a token in each, its id below, supervised ones in green."""
    line = next(line for line in (ROOT / "data" / "pirate.jsonl").read_text("utf-8").splitlines() if "17 times" in line)
    _, _, tokenizer = one_file.open_model(str(MODEL))
    ids, supervised = tokenizer.sample(json.loads(line)["messages"])
    pieces = [tokenizer.decode([i]).replace("\n", "\\n") for i in ids.tolist()]
    figure, ax = canvas(8.4, 1.85)
    x, y = 0.0, 15.5
    for piece, token, is_supervised in zip(pieces, ids.tolist(), supervised.tolist(), strict=True):
        width = 0.74 * max(len(piece), len(str(token)) * 0.85) + 0.9
        if x + width > 84:
            x, y = 0.0, y - 4.5
        color = "#d8ecdf" if is_supervised else "#eef0f2"
        ax.add_patch(Rectangle((x, y - 2), width - 0.25, 4, color=color))
        ax.text(x + width / 2, y + 0.75, piece, ha="center", va="center", fontsize=7, family="monospace")
        ax.text(x + width / 2, y - 1.1, str(token), ha="center", va="center", fontsize=6, color=MUTED)
        x += width
    return figure


# 2. The model in one picture -----------------------------------------------------------------------------------------


def box(ax: Axes, x: float, y: float, width: float, text: str, color: str = LIGHT, height: float = 3.2) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="none"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7.5)


def arrow(ax: Axes, x1: float, y1: float, x2: float, y2: float, text: str = "", side: str = "left") -> None:
    ax.annotate("", (x2, y2), (x1, y1), arrowprops={"arrowstyle": "-|>", "color": MUTED, "linewidth": 0.9})
    shift = 0.5 if side == "left" else -0.5
    place = (x1 + x2) / 2 + shift, (y1 + y2) / 2
    ax.text(*place, text, ha=side, va="center", fontsize=7, color=BLUE, family="monospace")


@picture
def picture_02_model() -> Figure:
    """Llama-3-8B: on the left the model, on the right one of its blocks. Shapes are those of the real modules."""
    model = llama3_8b()
    config = model.config
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, KV, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    figure, ax = canvas(8.7, 6.3)
    for y, text, color in (
        (54, f"embed_tokens  {V:,} x {D:,}", LIGHT),
        (36, f"block, {config.num_hidden_layers} times\nx = x + attention(norm(x))\nx = x + mlp(norm(x))", "#f6e3d6"),
        (24, f"norm  {D:,}", LIGHT),
        (13, f"lm_head  {V:,} x {D:,}", LIGHT),
    ):
        box(ax, 2, y, 26, text, color, height=9 if "block" in text else 3.2)
    for y1, y2, text in (
        (61.5, 57.4, "tokens (B, T)"),
        (53.8, 45.2, f"x (B, T, {D})"),
        (35.8, 27.4, f"x (B, T, {D})"),
        (23.8, 16.4, f"(B, T, {D})"),
        (12.8, 7, f"logits (B, T, {V})"),
    ):
        arrow(ax, 15, y1, 15, y2, text)
    left, mid, right = 36, 53, 70
    ax.add_patch(Rectangle((33.5, 1), 53, 60.5, facecolor="none", edgecolor="#d9702e", linewidth=0.8, linestyle=":"))
    ax.text(34.3, 59.6, "one block", fontsize=8, color=ORANGE, va="center")
    box(ax, 47, 54.5, 26, f"input_layernorm  {D:,}")
    arrow(ax, 60, 61, 60, 57.9, f"x (B, T, {D})")
    heads = {"q": (left, H), "k": (mid, KV), "v": (right, KV)}
    for name, (x, n) in heads.items():
        box(ax, x, 46.5, 12.5, f"{name}_proj\n{n * hd:,} x {D:,}", height=4.2)
        arrow(ax, 60, 54.3, x + 6, 51, f"(B, T, {D})" if name == "v" else "")
        arrow(ax, x + 6, 46.3, x + 6, 41.6, f"(B, T, {n}, {hd})")
    for x in (left, mid):
        box(ax, x, 38.2, 12.5, "RoPE")
        arrow(ax, x + 6, 38, 60 if x == mid else 52, 34.9)
    arrow(ax, right + 6, 41.4, 66, 34.9)
    box(ax, 44, 31.4, 32, "softmax(q k^T / sqrt(hd)) v, own document, no future")
    arrow(ax, 60, 31.2, 60, 28.1, f"(B, T, {H} * {hd})")
    box(ax, 47, 24.7, 26, f"o_proj  {D:,} x {H * hd:,};  added to x")
    arrow(ax, 60, 24.5, 60, 21.9, f"x (B, T, {D})")
    box(ax, 47, 18.5, 26, f"post_attention_layernorm  {D:,}")
    for x, name in ((40, "gate_proj"), (62, "up_proj")):
        box(ax, x, 12.3, 18, f"{name}  {FF:,} x {D:,}")
        arrow(ax, 60, 18.3, x + 9, 15.7, f"(B, T, {D})" if name == "up_proj" else "")
        arrow(ax, x + 9, 12.1, 60, 8.1, f"(B, T, {FF})" if name == "up_proj" else "")
    box(ax, 41, 4.7, 38, f"down_proj(silu(gate) * up)  {D:,} x {FF:,};  added to x")
    arrow(ax, 60, 4.5, 60, 1.1, f"x (B, T, {D})")
    return figure


# 3. RoPE and documents in a row --------------------------------------------------------------------------------------


@picture
def picture_03_rope_documents() -> Figure:
    """A real packed row: who sees whom; and the angles of some pairs of dimensions over the positions."""
    row = next(row for row in packed_rows() if len(row) == 4)
    lengths = samples().lengths[row].tolist()
    segments = Segments(((*lengths, 512 - sum(lengths)),)) if sum(lengths) < 512 else Segments((tuple(lengths),))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained", width_ratios=(2, 3))
    left.imshow(segments.mask[0, 0][::4, ::4].numpy(), cmap="Blues", vmax=1.5, extent=(0, 512, 512, 0))
    left.set(title="which tokens a token sees", xlabel="seen token", ylabel="token", xticks=range(0, 513, 128))
    left.set_yticks(range(0, 513, 128))
    cos = (segments.positions[..., None] * rope_frequencies(llama3_8b().config)).cos()
    for pair, color in ((0, ORANGE), (8, GREEN), (16, BLUE), (24, PURPLE)):
        right.plot(cos[0, :, pair].numpy(), color=color, linewidth=0.9, label=f"pair {pair}")
    for end in torch.tensor(lengths).cumsum(0).tolist():
        right.axvline(end, color=MUTED, linewidth=0.8, linestyle=":")
    right.set(
        title="cosine of the RoPE angle: it starts again with each document",
        xlabel="token",
        xlim=(0, 300),
        ylim=(-1.05, 1.3),
    )
    right.legend(frameon=False, fontsize=7.5, ncols=4, loc="upper right")
    return figure


# 4. Four bits --------------------------------------------------------------------------------------------------------


@picture
def picture_04_four_bits() -> Figure:
    """The weights of a real matrix between the levels, and how often each level is used."""
    w = weights().load("blk.10.ffn_up.weight")
    groups = w.view(-1, nf4.BLOCKSIZE)
    scaled = groups / groups.abs().amax(1, keepdim=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained", width_ratios=(3, 2))
    left.hist(scaled.flatten().numpy(), bins=120, range=(-1, 1), density=True, color=LIGHT)
    for level in nf4.NF4_LEVELS.tolist():
        left.axvline(level, color=BLUE, linewidth=1)
    left.set(
        title="weights / absmax of a matrix, and the 16 levels", yticks=[], xlabel="w / absmax", xlim=(-1.02, 1.02)
    )
    packed, _ = nf4.quantize_nf4(w)
    codes = torch.cat((packed >> 4, packed & 15)).flatten()
    even = (scaled * 7).round().flatten().int() + 7  # 15 levels
    for offset, name, found, color in ((-0.2, "NF4", codes, BLUE), (0.2, "evenly spaced", even, ORANGE)):
        share = torch.bincount(found.int(), minlength=16) / found.numel() * 100
        right.bar([i + offset for i in range(16)], share.tolist(), 0.4, color=color, label=name)
    right.axhline(100 / 16, color=MUTED, linewidth=0.8, linestyle=":")
    right.set(title="percent of the weights on each level", xlabel="code", xticks=range(0, 16, 5))
    right.legend(frameon=False, fontsize=8)
    return figure


# 5. LoRA -------------------------------------------------------------------------------------------------------------


@picture
def picture_05_lora() -> Figure:
    """W and its update to scale, and the gradient check."""
    layer = llama3_8b().model.layers[0].mlp.up_proj
    (n_out, n_in), r = (layer.out_features, layer.in_features), layer.lora_A.shape[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    for x, y, width, height, color in (
        (0, 0, n_in, n_out, LIGHT),
        (n_in + 2500, 0, r, n_out, ORANGE),
        (n_in + 3400, n_out - r, n_in, r, GREEN),
    ):
        left.add_patch(Rectangle((x, y), width, height, color=color))
    left.text(n_in / 2, n_out / 2, f"W\n{n_out} x {n_in}\nfrozen,\n4 bits", ha="center", va="center", fontsize=7)
    left.text(n_in + 1250, n_out / 2, "+ s", ha="center", va="center", fontsize=11)
    left.text(n_in + 3000, n_out / 2, f"B\n{n_out} x {r}", va="center", fontsize=8, color=ORANGE)
    left.text(n_in + 3400, n_out - 1200, f"A\n{r} x {n_in}", va="center", fontsize=8, color=GREEN)
    left.set(xlim=(0, 12000), ylim=(-100, n_out + 100), aspect="equal", title="up_proj of Llama-3-8B, to scale, r = 64")
    left.axis("off")
    steps = [10.0**-i for i in range(1, 12)]
    right.loglog(steps, [gradient_error(step) for step in steps], color=BLUE, marker="o", markersize=3)
    right.set(title="formulas against differences, float64", xlabel="step of the difference", ylabel="relative error")
    return figure


# 6. Where the memory goes --------------------------------------------------------------------------------------------


@picture
def picture_06_memory() -> Figure:
    """Predicted parts as bars, measured peaks as points."""
    settings = memory_settings()
    figure, ax = plt.subplots(figsize=(8.4, 2.9), layout="constrained")
    places = range(len(settings), 0, -1)
    start = [0.0] * len(settings)
    colors = (BLUE, LIGHT, ORANGE, GREEN, PURPLE)
    for name, color in zip(next(iter(settings.values()))[0], colors, strict=True):
        sizes = [parts[name] for parts, _ in settings.values()]
        ax.barh(places, sizes, 0.62, start, color=color, label=name)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    ax.plot([peak for _, peak in settings.values()], places, "|", color=INK, markersize=15, label="measured, H100")
    ax.set(yticks=places, yticklabels=settings, xlabel="GiB", title="Llama-3-8B, r 64 on all linear layers, AdamW")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


# 7. One step ---------------------------------------------------------------------------------------------------------


@picture
def picture_07_one_step() -> Figure:
    """Four real micro-batches of one chat each: the weight of a single token in the step under two rules."""
    counts = samples().num_targets[:4].tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.5), layout="constrained")
    names = [f"micro-batch {i}" for i in range(1, 5)]
    left.bar(names, counts, color=LIGHT)
    for i, count in enumerate(counts):
        left.text(i, count / 2, str(count), ha="center", va="center")
    left.set(title="supervised tokens of the first four chats")
    once = [100 / sum(counts)] * 4
    means = [100 / (4 * count) for count in counts]
    for shift, values, color, label in ((-0.2, once, BLUE, "divided once"), (0.2, means, ORANGE, "mean of four means")):
        right.bar([i + shift for i in range(4)], values, 0.4, color=color, label=label)
    right.set(title="weight of one token in the step, percent", xticks=range(4), xticklabels=names)
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.tick_params(axis="x", labelsize=7.5)
    return figure


# 8. Rounding ---------------------------------------------------------------------------------------------------------


@picture
def picture_08_rounding() -> Figure:
    """Every tensor of every layer: the largest error found and the largest error allowed."""
    found = measured("rounding")
    figure, ax = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    keys = list(found["float32"])
    for dtype, color in (("float32", BLUE), ("bfloat16", ORANGE)):
        for place, key in enumerate(reversed(keys)):
            error, bound = found[dtype][key]
            ax.plot([error, bound], [place, place], color=color, linewidth=0.8, alpha=0.5)
            ax.plot(error, place, "o", color=color, markersize=4, label=f"{dtype}, found" if not place else None)
            ax.plot(bound, place, "|", color=color, markersize=9, label=f"{dtype}, bound" if not place else None)
    ax.set(xscale="log", yticks=range(len(keys)), yticklabels=reversed(keys))
    ax.set(xlabel="largest error, as a share of the tensor's root mean square")
    ax.legend(frameon=False, fontsize=8, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 1))
    return figure


# 9. From plain to fast -----------------------------------------------------------------------------------------------

LEVERS = (  # LOG.md: what, ms before and after; Llama-3-8B, r 64, 4 x 2048, one H100; dropout 0.05 unless named
    ("x read once for the gradients of A", 542, 532),
    ("update inside the matmuls with W, CUDA graphs", 532, 513),
    ("SwiGLU's backward pass and dA, dB in one kernel", 513, 504.5),
    ("cheaper dropout mask, x A^T computed on the way", 511, 496),
    ("SwiGLU computed once in its backward pass", 496, 487),
    ("dropout 0: update merged into W", 503, 483),
    ("dropout 0: last norm in one kernel, no gradient of embeddings", 482, 470),
)


@picture
def picture_09_speed() -> Figure:
    """Milliseconds of a step before and after each lever, as LOG.md has measured them, and the floor."""
    figure, ax = plt.subplots(figsize=(8.4, 3.1), layout="constrained")
    for place, (_, before, after) in enumerate(reversed(LEVERS)):
        ax.barh(place, before - after, 0.6, after, color=GREEN)
        ax.text(after - 2, place, f"{after:g}", ha="right", va="center", fontsize=8)
        ax.text(before + 2, place, f"{before - after:g} ms", va="center", fontsize=8, color=MUTED)
    ax.axvline(393, color=ORANGE, linewidth=1)
    ax.text(395, len(LEVERS) - 0.5, "floor, 393: matmuls and attention alone", fontsize=8, color=ORANGE, va="center")
    ax.set(yticks=range(len(LEVERS)), yticklabels=[name for name, *_ in reversed(LEVERS)])
    ax.set(xlim=(385, 570), ylim=(-0.6, len(LEVERS)), xlabel="ms a step; the axis does not begin at zero")
    return figure


# 10. FSDP by hand ----------------------------------------------------------------------------------------------------


@picture
def picture_10_fsdp() -> Figure:
    """Two slots and the network while a micro-batch of six blocks passes, as the store itself orders it."""
    L = 6
    figure, ax = canvas(8.4, 2.6)
    x, unit = 9.0, 6.1
    uses = 0
    for kind, block, slot in events_of_micro_batch(L):
        if kind == "use":
            color = BLUE if uses < L else PURPLE
            box(ax, x + unit * uses, 15 - 4.5 * slot, unit - 0.4, str(block), LIGHT if uses < L else "#e4ddf0")
            ax.add_patch(Rectangle((x + unit * uses, 19.6), unit - 0.4, 1.1, color=color))
            uses += 1
        else:
            box(ax, x + unit * uses, 4.5, unit - 0.4, f"{block} to slot {slot}", "#f6e3d6", 2.6)
            arrow(ax, x + unit * (uses + 0.7), 7.2, x + unit * (uses + 1.1), 10.4 if slot else 14.9)
    for y, text in ((16.6, "slot 0"), (12.1, "slot 1"), (5.8, "gather")):
        ax.text(0, y, text, fontsize=8, color=MUTED, va="center")
    for start, text, color in ((0, "forward", BLUE), (L, "backward", PURPLE)):
        ax.text(x + unit * start, 22.3, text, fontsize=8, color=color)
    ax.text(x, 1.2, "time", fontsize=8, color=MUTED)
    arrow(ax, x + 4, 1.2, x + unit * 2 * L, 1.2)
    return figure


# 11. Merge -----------------------------------------------------------------------------------------------------------


@picture
def picture_11_merge() -> Figure:
    """How far each form of the demo's trained model is from it, over its size on disk."""
    figure, ax = plt.subplots(figsize=(8.4, 3.1), layout="constrained")
    for form in measured("merge")["forms"]:
        name, kl, size = form["form"], form["mean_kl"], form["num_bytes"] / 1e6
        if kl:
            color = BLUE if name.startswith("GGUF") else ORANGE
            ax.plot(size, kl, "o", color=color, markersize=5)
            shift = (6, 3) if name != "GGUF q5_k_m" else (6, -8)
            ax.annotate(name.removeprefix("GGUF "), (size, kl), shift, textcoords="offset points", fontsize=8)
    ax.axhline(0.02, color=MUTED, linewidth=0.8, linestyle=":")
    ax.set(yscale="log", xscale="log", xlabel="MB", ylabel="KL, nats a token", xlim=(75, 1000), ylim=(7e-4, 2.5))
    ax.set(title="distance from the trained model; blue: GGUF types of the merged model")
    ax.set_xticks([100, 200, 400, 800], labels=["100", "200", "400", "800"])
    ax.minorticks_off()
    return figure


# 12. A GGUF byte by byte ---------------------------------------------------------------------------------------------

REGIONS = (  # of small.gguf: bytes, meaning
    (4, "magic"),
    (4, "version 3"),
    (8, "1 tensor"),
    (8, "2 metadata entries"),
    (8, "length of the key"),
    (20, "key: general.architecture"),
    (4, "type 8: text"),
    (8, "length of the value"),
    (5, "value: llama"),
    (8, "length of the key"),
    (17, "key: llama.block_count"),
    (4, "type 4: u32"),
    (4, "value: 1"),
    (8, "length of the name"),
    (1, "name: w"),
    (4, "1 dimension"),
    (8, "256 weights"),
    (4, "type 12: Q4_K"),
    (8, "offset in the data: 0"),
    (25, "zeros up to a multiple of 32"),
    (2, "d"),
    (2, "dmin"),
    (12, "8 scales and 8 minima of 6 bits"),
    (128, "256 codes of 4 bits"),
    (16, "zeros"),
)


@picture
def picture_12_gguf() -> Figure:
    """small.gguf as hexadecimal, 16 bytes a line, with what they mean; without most of the codes."""
    raw, shown = SMALL.read_bytes(), 13
    assert sum(size for size, _ in REGIONS) == len(raw)
    figure, ax = canvas(8.6, 0.25 * shown + 0.1)
    names: list[list[str]] = [[] for _ in range(len(raw) // 16)]
    colors, start = ("#dbe8f5", "#f6e3d6", "#d8ecdf", "#e4ddf0"), 0
    for i, (size, meaning) in enumerate(REGIONS):
        names[start // 16].append(meaning)
        for byte in range(start, start + size):
            row, column = divmod(byte, 16)
            x, y = 5.5 + 2.3 * column, 2.5 * (shown - row)
            if row < shown and (byte == start or not column):
                width = 2.3 * min(16 - column, start + size - byte)
                ax.add_patch(Rectangle((x, y - 2.2), width, 2.2, facecolor=colors[i % 4]))
            if row < shown:
                ax.text(x + 1.15, y - 1.1, f"{raw[byte]:02x}", ha="center", va="center", fontsize=7, family="monospace")
        start += size
    for row in range(shown):
        y = 2.5 * (shown - row) - 1.1
        ax.text(4.5, y, str(16 * row), ha="right", va="center", fontsize=7, color=MUTED)
        ax.text(43.5, y, ";  ".join(names[row]) or "...", va="center", fontsize=6.8)
    return figure


# 13. Prompt, mask, Modelfile -----------------------------------------------------------------------------------------


@picture
def picture_13_prompt() -> Figure:
    """The demo's trained model under four prompts: how many answers end, and the loss of the right answers."""
    found = measured("prompts")
    names = ["as in training", "Question: ...  Answer:", "the question alone", "Llama-3's template"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.3), layout="constrained", sharey=True)
    places, colors = range(len(names), 0, -1), [GREEN, ORANGE, ORANGE, ORANGE]
    for ax, key, title in (
        (left, "ended", f"of {found['questions']} answers, ended within 150 tokens"),
        (right, "loss", "loss of the right answers, nats a token"),
    ):
        values = [found[name][key] for name in names]
        ax.barh(places, values, 0.6, color=colors)
        for place, value in zip(places, values, strict=True):
            ax.text(value, place, f" {value:.3g}", va="center", fontsize=8)
        ax.set(title=title, yticks=places, yticklabels=names)
    right.set_xlim(3, 4)
    right.set_xlabel("the axis begins at 3")
    return figure


# 14. Kill it ---------------------------------------------------------------------------------------------------------


@picture
def picture_14_resume() -> Figure:
    """The loss of a run, of its resumption, and of a resumption without the optimizer's state."""
    losses = measured("kill")
    figure, ax = plt.subplots(figsize=(8.4, 2.8), layout="constrained")
    for (name, values), color, style in zip(losses.items(), (BLUE, GREEN, ORANGE), ("-", "o", "--"), strict=True):
        steps = range(41 - len(values), 41)
        ax.plot(steps, values, style, color=color, linewidth=1.2, markersize=4, label=name)
    ax.axvline(20, color=MUTED, linewidth=0.8, linestyle=":")
    ax.set(xlabel="step", ylabel="loss, nats", title="a tiny model with dropout, 40 steps")
    ax.legend(frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    asked = {number.zfill(2) for number in sys.argv[1:]}
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            if not asked or name[:2] in asked:
                path = ROOT / "docs" / "tour" / f"{name}.svg"
                figure = draw()
                figure.savefig(path, metadata={"Date": None}, facecolor="white")
                plt.close(figure)
                print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
