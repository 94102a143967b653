"""Is what stands in a .gguf file the model that was trained? Asked of the file itself, just written.

Of the file, by our own reader:

    tensors     is each of them the merged weight, rounded once to the type of the table, bit by bit, and the
                configuration the same? Is each merged weight that of base and adapter, rounded once to its dtype?
    words       do texts get the ids that they had in training, from the vocabulary in the file? Are tokens, end tokens
                and prompts those of the run that the user named?

Of real llama.cpp (export/llama_cpp.py), where the package xllamacpp is installed:

    words       the same texts
    prompts     conversations, with tools and without, and those of the run's own data: does the template in the file,
                run by llama.cpp's own engine, give the text and the ids of training?
    end         does it stop at the token at which an answer ends in training?
    answers     does it compute on held-out texts what we compute from the file?

And how far the answers of each form are from the trained model's (certificate.py). A proof ends in one verdict line,
which names what is wrong, or what was not asked.

An adapter's own .gguf file is proven on its base's: the update of each layer is read back, and llama.cpp computes with
both files.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.errors import UserError, visible
from ..config.files import check_writable, read_json, sha256_of, write_text
from ..config.options import ExportOptions
from ..config.schema import Config
from ..data.prompts import PromptFormat
from ..gguf.config import model_config
from ..gguf.imatrix import Imatrix, read_imatrix
from ..gguf.names import gguf_name, heads_to_permute, unpermute_rows
from ..gguf.reader import read_gguf
from ..model import rope_frequencies
from ..run.usable import talking
from ..tokenizer.tokenizer import Tokenizer, load_tokenizer
from ..weights.adapter import Update, adapter_hash, read_trained, read_updates
from ..weights.checkpoint import (
    DTYPE_NAMES,
    GGUFWeights,
    Tensors,
    Weights,
    end_ids,
    fingerprint,
    open_weights,
    read_generation,
)
from ..weights.hub import local_path
from .certificate import (
    BASE_AND_ADAPTER,
    GGUF,
    MAX_KL,
    TRAINED,
    Form,
    Texts,
    compare,
    held_out_texts,
    hidden_states,
    score_forms,
)
from .conversations import as_sent, conversations
from .forms import Merged, Rounded, bytes_on_disk, trained_form
from .gguf_model import base_of, export_adapter, export_gguf, prompt_format, usual_format
from .llama_cpp import NotAsked, Refused, Server
from .serving import print_table, tokens_per_second
from .tokenizer_metadata import ASKED, end_of_answer, tokenizer_metadata, without_bos

WORDS: list[str] = ASKED["texts"]
AGAIN = "merge and export again, and if that does not help, report this line"
ALIKE = "train with a chat template that llama.cpp writes alike, or serve with a program that runs Jinja itself"
WITHOUT = f"{GGUF}without --imatrix"
IN_LLAMA_CPP = "the same in llama.cpp"
NEAR = 1e-6  # of a number that is rounded to float32 in a file
NOISE = 2.0**-16  # of the largest weight of a tensor: two float32 sums in another order, several times over
OTHER_CODES = 1e-3  # of the weights of a layer that went through NF4: another device may round a tie the other way
ONE_CODE = 0.31  # of the largest weight: how far apart two NF4 codes can be


@dataclass
class Proof:
    """What is compared, and what was found: `facts` for the record, what is wrong, and what was not asked."""

    file: Path
    file_type: str
    model: Path  # that was exported
    tok: Tokenizer  # of the run, and the format of its prompts; without a run, of the model
    fmt: PromptFormat
    config: Config | None  # of the run that the user named
    imatrix: Imatrix | None = None  # that the file was made with
    adapter: tuple[str, Path] | None = None  # the folder of one and its .gguf file, of which `file` is the base

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        merge = self.model / "merge.json"
        self.record = read_json(merge) if merge.exists() else {}
        self.proven = self.adapter[1] if self.adapter else self.file
        self.lora: dict[str, Any] = {"lora": str(self.proven)} if self.adapter else {}  # setting of llama.cpp's server
        self.name = f"{self.proven.name} on {self.file.name}" if self.adapter else self.file.name
        self.record_path = merge if self.record else self.proven.with_suffix(".proof.json")
        self.is_on_original = self.record.get("base") == "original"
        self.is_on_other = False  # base than the adapter was trained on
        self.facts: dict[str, Any] = {"type": self.file_type.lower(), "file_sha256": sha256_of(self.proven)}
        self.wrong, self.not_asked = list[str](), list[str]()
        self.trained: Form | None = None

    def fail(self, what: str, advice: str = AGAIN) -> None:
        """Something is wrong."""
        self.wrong.append(f"{what}. Do not serve it; {advice}.")

    def verdict(self) -> str:
        """The line that everything comes down to."""
        gaps = f"; not asked: {'; '.join(self.not_asked)}" if self.not_asked else ""
        is_what, of_type = f"verdict: {self.name} is what was trained", f"as {self.facts['type']}"
        if self.wrong:
            more = f" ({len(self.wrong) - 1} more in {self.record_path})" if len(self.wrong) > 1 else ""
            line = f"verdict: NOT what was trained: {self.proven}: {self.wrong[0]}{more}"
        elif self.trained is None:
            line = f"verdict: not proven: {self.name} is the model in {self.model}, {of_type}{gaps}"
        else:
            if self.is_on_other or (self.is_on_original and self.trained.name == TRAINED):
                option = "--other_base" if self.is_on_other else "--base original"
                how = "computes on weights that it was not trained on" if self.adapter else f"is what {option} merged"
                is_what = f"verdict: {self.name} {how}, which is not the model that was trained"
            kls = [form["mean_kl"] for form in self.facts.get("forms", ()) if form["form"].startswith(GGUF)]
            far = f", {kls[0]:.2g} nats a token from the trained model" if kls else ""
            form = "two files" if self.adapter else f"merged, {of_type}"
            line = f"{is_what}: base and adapter, {form}{far}{gaps}"
        return visible(" ".join(line.split()))


def export_and_prove(
    model: str | Path, out: str | Path, type: str, config: Config | None, asked: ExportOptions, imatrix: Path | None
) -> None:
    """Write the file as `export_gguf` does, and prove it; what can be wrong with the run is found before.

    Args:
        config: of the run that the user named.
        asked: `data`: held-out texts of the user's, else those of the run; `max_tokens` of them.
        imatrix: the file of an importance matrix.
    """
    if (local_path(model) / "merge.json").exists():  # which gets the record
        check_writable(model, "--model")
    tok, fmt = words_of(model, config)
    texts = held_out_texts(config, tok, fmt, asked.data, asked.max_tokens) if asked.max_tokens else None
    export_gguf(model, out, type, imatrix)
    measured = read_imatrix(imatrix) if imatrix else None
    prove_file(Proof(Path(out), type.upper(), local_path(model), tok, fmt, config, measured), texts)


def export_and_prove_adapter(
    adapter: str, base: str | None, out: str | Path, type: str, config: Config | None, asked: ExportOptions
) -> None:
    """The same for an adapter's own file, on its base's."""
    base = base or base_of(adapter)
    file = local_path(base)
    if file.suffix != ".gguf":
        raise UserError(f"--prove: {base} is no .gguf file, which llama.cpp needs as the base. Name one with --model.")
    tok, fmt, _ = talking(base, adapter, open_weights(base).config["vocab_size"])
    fmt = fmt or usual_format(tok)
    texts = held_out_texts(config, tok, fmt, asked.data, asked.max_tokens) if asked.max_tokens else None
    export_adapter(adapter, base, out, type, asked.other_base)
    prove_file(Proof(file, type.upper(), file, tok, fmt, config, adapter=(adapter, Path(out))), texts)


def words_of(model: str | Path, config: Config | None) -> tuple[Tokenizer, PromptFormat]:
    """Tokenizer and format of the prompts of the run, or without one of the model."""
    if config is None or adapter_hash(Path(config.output_dir).absolute()) is None:  # which is no hub name
        tok = load_tokenizer(model)
        return tok, prompt_format(local_path(model), tok)
    base = open_weights(config.base_model)
    tok, of_run, _ = talking(config.base_model, config.output_dir, base.config["vocab_size"])
    return tok, of_run or usual_format(tok)


def prove_file(proof: Proof, texts: tuple[str, Texts] | None) -> None:
    """Compare the file with what was trained; print what was found and a verdict, and keep both.

    The trained model is base and adapter of the run that the user named; without one the exported folder is the truth.
    The paths in its merge.json are not followed: the folder may come from anybody. The record stands in merge.json, or
    beside the file where the folder has none.

    Args:
        texts: `held_out_texts`.
    Raises:
        UserError: base or adapter cannot be read; SystemExit: with 1, when the file is not what was trained.
    """
    source = open_weights(proof.model)
    proof.trained = trained_model(proof)
    trained = proof.trained.weights if proof.trained else None
    try:
        stored = GGUFWeights(proof.file)
        computes: Tensors = stored
        if proof.adapter and isinstance(trained, Merged):
            computes = with_adapter(proof, stored, trained)
        else:
            compare_tensors(proof, stored, source)
        compare_words(proof, load_tokenizer(proof.file).encode)
        if isinstance(trained, Merged) and not proof.adapter:
            compare_merged(proof, source, trained)
        if texts is None:
            proof.not_asked.append("answers on held-out texts (--data names a file)")
            ask_llama_cpp(proof)
        else:
            compare_answers(proof, computes, source, *texts)
        if isinstance(trained, Merged) and not proof.adapter:
            compare_run(proof, stored, trained.base)
    except UserError as error:  # the file, or a weight that it is compared with, is damaged
        proof.fail(str(error).rstrip("."))
    line = proof.verdict()
    proof.facts |= {"wrong": proof.wrong, "not_asked": proof.not_asked, "verdict": line, "imatrix": bool(proof.imatrix)}
    earlier = proof.record.get("gguf")
    gguf = (earlier if isinstance(earlier, dict) else {}) | {proof.proven.name: proof.facts}
    if proof.trained and "forms" in proof.facts and not (proof.wrong or proof.is_on_other):
        proof.facts["tokens_per_second"] = tokens_per_second(proof.file, **proof.lora)
        proof.facts["advice"] = print_table(proof.proven.parent, gguf, proof.facts)
    record = proof.record | {"gguf": gguf} if proof.record else proof.facts
    write_text(proof.record_path, json.dumps(record, indent=2) + "\n")
    print(f"{proof.record_path}: has the proof of {proof.name}\n{line}", flush=True)
    if proof.wrong:
        raise SystemExit(1)


def compare_answers(proof: Proof, stored: Tensors, source: Weights, name: str, texts: Texts) -> None:
    """What the trained model, the exported one and the file answer on held-out texts, of the file by llama.cpp too."""
    own = hidden_states(stored, texts, proof.device)
    theirs, num_bytes = ask_llama_cpp(proof, texts, own), proof.file.stat().st_size
    num_bytes += proof.adapter[1].stat().st_size if proof.adapter else 0
    forms = [proof.trained] if proof.trained else []
    if proof.model.is_dir():
        forms.append(Form("merged" if proof.record else "exported", source, bytes_on_disk(proof.model)))
    forms.append(Form(BASE_AND_ADAPTER if proof.adapter else f"{GGUF}{proof.file.name}"[:26], stored, num_bytes, own))
    if proof.imatrix:
        without = Rounded(source, proof.file_type, proof.device)
        forms.append(Form(WITHOUT, without, without.num_bytes))
    in_llama_cpp = [Form(IN_LLAMA_CPP, stored, num_bytes, theirs)] if theirs else []
    scores = score_forms(forms + in_llama_cpp, texts, proof.device)
    if proof.imatrix:
        kl, other = (score.mean_kl for score in scores[len(forms) - 2 : len(forms)])
        better = f"{1 - kl / other:.0%} less" if kl < other else "no less, so leave it out"
        print(f"--imatrix {kl:.5f} nats a token with it, {other:.5f} without: {better}")
    proof.facts |= {"held_out": name, "forms": [score._asdict() for score in scores[: len(forms)]]}
    if theirs:
        proof.facts["llama_cpp"] |= scores[-1]._asdict()
    if proof.trained and not proof.is_on_original and not scores[1].mean_kl <= MAX_KL:
        what = "it computes" if proof.adapter else "was merged"
        proof.fail(f"what {what} is {scores[1].mean_kl:.3g} nats a token from the trained model")


# ------------------------------------------------------------------------------------------------ by our own reader


def compare_tensors(proof: Proof, stored: GGUFWeights, source: Weights) -> None:
    """Tensors and configuration of the file against the folder's."""
    if not compare_configs(proof, stored, source, "the model"):
        return
    rounded, worst = Rounded(source, proof.file_type, proof.device, proof.imatrix), 0.0
    for name in stored.names():
        w, ours = stored.load(name).to(proof.device), source.load(name).to(proof.device, torch.float32)
        if not torch.equal(w, rounded.load(name)):
            return proof.fail(f"tensor {name} is not the merged model's, rounded to {rounded.types[name]}")
        worst = max(worst, ((w - ours).norm() / ours.norm().clamp(min=1e-30)).item())
    proof.facts |= {"tensors": len(stored.names()), "largest_relative_error": worst}
    print(f"tensors   {len(stored.names())} equal those of {proof.model}, rounded once (at most {worst:.2%} off)")


def compare_configs(proof: Proof, stored: GGUFWeights, source: Weights, whose: str) -> bool:
    """The numbers that a model computes with. Returns whether the tensors can be compared."""
    config, written = (model_config(weights.config, weights.where) for weights in (source, stored))
    for name in (f.name for f in fields(config) if f.type in (int, float, bool) and f.name != "rope_theta"):
        if not math.isclose(getattr(config, name), getattr(written, name), rel_tol=NEAR):
            proof.fail(f"{name} is {getattr(written, name)} in it and {getattr(config, name)} in {whose}")
            return False
    if not torch.allclose(rope_frequencies(config), rope_frequencies(written), rtol=10 * NEAR):
        proof.fail(f"its rotary embeddings turn by other angles than those of {whose}")
    return True


def trained_model(proof: Proof) -> Form | None:
    """Base and adapter of the run that the user named, as training computed with them."""
    adapter: str | Path
    if proof.adapter:
        adapter, base = proof.adapter[0], str(proof.file)
        proof.is_on_original = read_trained(adapter).in_4bit
    elif proof.config:
        adapter, base = Path(proof.config.output_dir), proof.config.base_model
    else:
        proof.not_asked.append("the trained model (give the YAML file of its run first)")
        return None
    digest = adapter_hash(adapter)
    if digest is None:
        proof.not_asked.append(f"the trained model ({adapter} has no adapter)")
        return None
    weights, trained_on = open_weights(base), read_trained(adapter).base
    proof.facts |= {"adapter_sha256": digest, "base_fingerprint": fingerprint(weights)}
    if proof.record.get("adapter_sha256", digest) != digest:
        proof.fail(f"{proof.model} was merged from another adapter than the one in {adapter}")
    if proof.record.get("base_fingerprint", proof.facts["base_fingerprint"]) != proof.facts["base_fingerprint"]:
        proof.fail(f"{proof.model} was merged onto other weights than those of {base}")
    proof.is_on_other = trained_on not in (None, proof.facts["base_fingerprint"])
    if trained_on is None:
        proof.not_asked.append(f"whether {adapter} was trained on these weights of {base} (it has no fingerprint)")
    return trained_form(weights, read_updates(adapter), adapter, proof.device)


def with_adapter(proof: Proof, base: GGUFWeights, trained: Merged) -> Merged:
    """Base and adapter as their two files have them; each update against that of the adapter's folder."""
    assert proof.adapter
    file, config = read_gguf(proof.adapter[1]), model_config(base.config, base.where)
    alpha, updates = file.metadata["adapter.lora.alpha"], dict[str, Update]()
    (of_type,) = (torch.finfo(dtype) for dtype, name in DTYPE_NAMES.items() if name == proof.file_type)
    unit, smallest = of_type.eps, of_type.eps * of_type.tiny
    for layer, update in trained.updates.items():
        name = gguf_name(f"{layer}.weight")
        heads = heads_to_permute(name, config.num_attention_heads, config.num_key_value_heads)
        a, b = file.load(f"{name}.lora_a"), file.load(f"{name}.lora_b")
        updates[layer] = written = Update(a, unpermute_rows(b, heads) if heads else b, alpha, False, None)
        pairs = (a, update.lora_A), (written.lora_B, update.lora_B * (update.scaling / written.scaling))
        if any(((x - y).abs() > unit / 2 * y.abs() + smallest + NEAR * y.abs().max()).any() for x, y in pairs):
            proof.fail(f"the update of {layer} is not that of {proof.adapter[0]}")
    if len(file.tensors) != 2 * len(updates):
        proof.fail(f"it has {len(file.tensors)} tensors, and the adapter has {2 * len(updates)}")
    kind = proof.file_type.lower()
    print(f"updates   {len(updates)} layers have those of {proof.adapter[0]}, rounded once to {kind}")
    return Merged(base, updates, False, torch.float32, torch.float32, proof.device)


def compare_merged(proof: Proof, source: Weights, trained: Merged) -> None:
    """Every tensor of the exported model against base and adapter: it may be off by one rounding to its dtype."""
    if proof.is_on_original:
        trained = Merged(trained.base, trained.updates, False, torch.float32, torch.float32, proof.device)
    if missing := sorted({*trained.names()} - {*source.names()}):
        return proof.fail(f"{proof.model} has no tensor {missing[0]}, and the trained model has")
    for name in trained.names():
        w, exact = source.load(name), trained.load(name)
        bound = torch.finfo(w.dtype).eps / 2 * exact.abs() + NOISE * exact.abs().max()
        distance, in_nf4 = (w.to(proof.device, torch.float32) - exact).abs(), trained.in_4bit and ".layers." in name
        off = (distance > bound).float().mean()
        if off > (OTHER_CODES if in_nf4 else 0) or off and distance.max() > ONE_CODE * exact.abs().max():
            return proof.fail(f"tensor {name} of {proof.model} is not that of base and adapter ({off:.2%} are others)")
    print(f"merged    {len(trained.names())} tensors of {proof.model} are those of base and adapter, rounded once")


def compare_words(proof: Proof, encode: Callable[[str], list[int]], by: str = "its vocabulary") -> None:
    """Texts, none of which may become special tokens, against training's ids; with the file's rule of where spaces go,
    which is chosen so that prompts have the same ids."""
    read = load_tokenizer(proof.file)
    if read.pre != proof.tok.pre:
        return proof.fail(f"its vocabulary splits text by the rule {read.pre!r}, in training it was {proof.tok.pre!r}")
    tok = replace(proof.tok, space_before=read.space_before, space_before_space=read.space_before_space)
    for text in WORDS:
        if encode(text) != tok.encode(text):
            return proof.fail(f"{by} gives {text!r} other token ids than in training")
    proof.facts["texts"] = len(WORDS)
    print(f"ids       {len(WORDS)} hard texts have the ids of training, by {by}")


def compare_run(proof: Proof, stored: GGUFWeights, base: Weights) -> None:
    """What the file has besides tensors, against the run: the base's configuration, the run's tokenizer and prompts."""
    if proof.config is None or not compare_configs(proof, stored, base, "the trained model"):
        return
    tok, fmt, written = proof.tok, proof.fmt, stored.file.metadata
    ends = end_ids(read_generation(base), first=(fmt.end_id(tok), tok.eos_id))
    trained = tokenizer_metadata(tok, fmt, base.config["vocab_size"], proof.model, ends)
    for key in dict.fromkeys([*trained, *(key for key in written if key.startswith("tokenizer."))]):
        found, value = written.get(key), trained.get(key, ("", None))[1]
        if found != value and not (key == "tokenizer.chat_template" and str(found).endswith(value)):
            return proof.fail(f"its {key} is not that of the run in {proof.config.output_dir}")


# ------------------------------------------------------------------------------------------------ real llama.cpp


def ask_llama_cpp(
    proof: Proof, texts: Texts | None = None, own: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """Words, prompts and the end token; and `hidden_states` of held-out texts, where `own` are ours of the file."""
    documents = [  # (ids, places of what is supervised)
        (row.tokens.flatten()[start:end].tolist(), [i - start for i in row.supervised.tolist() if start <= i < end])
        for row in (texts.rows if texts else [])
        for _, start, end in row.segments.documents
    ]
    longest, before = max((len(ids) for ids, _ in documents), default=0), len(proof.wrong)
    try:
        settings = proof.lora | {"n_ctx": longest + 8, "hidden": True, "threads": torch.get_num_threads()}
        with Server(proof.file, **settings) as llama:
            compare_words(proof, llama.tokenize, "llama.cpp")
            count = compare_prompts(proof, llama)
            states = [torch.tensor(llama.hidden_states(ids))[places] for ids, places in documents]
    except NotAsked as error:
        proof.not_asked.append(f"llama.cpp ({error})")
        print(f"llama.cpp was not asked: {error}")
        return None
    except Refused as error:
        proof.fail(f"llama.cpp refuses it ({error})", ALIKE if "template" in str(error) else AGAIN)
        return None
    proof.facts["llama_cpp"] = {"texts": len(WORDS), "conversations": count}
    if len(proof.wrong) == before:
        print(f"prompts   {count} conversations have the ids of training in llama.cpp, and it stops where they end")
    if not states or not texts or not own:
        return None
    theirs = torch.cat(states).to(own[0]), own[1]
    kl = max(0.0, compare(own, theirs, texts.targets)[0])
    proof.facts["llama_cpp"] |= {"tokens": len(texts.targets), "kl_of_file": kl}
    if not kl <= MAX_KL:
        proof.fail(f"llama.cpp computes other answers from it than we do, {kl:.3g} nats a token away")
    return theirs


def compare_prompts(proof: Proof, llama: Server) -> int:
    """Conversations through the template in the file, by llama.cpp's engine, and its end token. Returns how many."""
    tok, fmt = proof.tok, proof.fmt
    asked = conversations(tok, fmt, proof.config, proof.not_asked)
    for name, messages, tools in asked:
        try:
            prompt = llama.prompt(as_sent(messages), tools)
            ids = llama.tokenize(prompt, add_special=True, parse_special=True)
        except Refused as error:
            proof.fail(f"llama.cpp refuses {name} with the chat template in it ({error})", ALIKE)
            continue
        if ids != fmt.encode_prompt(tok, messages, tools):
            text = without_bos(tok, fmt, fmt.render(tok, messages, True, tools))
            at = len(os.path.commonprefix([prompt, text]))
            theirs, ours = (repr(x[max(0, at - 20) : at + 20]) for x in (prompt, text))
            what = "other token ids" if prompt == text else f"{theirs} where training has {ours}"
            proof.fail(f"llama.cpp makes {what} of {name}", ALIKE)
    end = end_of_answer(tok, fmt)
    if llama.complete([end], 2, logit_bias=[[end, 1e4]])["stop_type"] != "eos":
        proof.fail(f"llama.cpp does not stop at {tok.vocab[end]!r}, which ends an answer in training")
    return len(asked)
