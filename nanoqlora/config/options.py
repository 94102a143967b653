"""The options of every command, each with its type, default and meaning, once.

They are here and not in the scripts because `--help` and a wrong option are answered without PyTorch. The docstring
of a class is what the command's `--help` prints first.
"""

from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from .errors import UserError
from .keys import Keys, Many, PathText, as_list, key


class RunOptions(Keys):
    """A command that reads the YAML file of a run, and takes its keys too; an option of the same name wins."""

    positional: ClassVar[tuple[str, ...]] = ("file",)
    reads: ClassVar[tuple[str, ...]] = ()  # the keys that it makes use of; (): all
    alone: ClassVar[tuple[str, ...]] = ()  # with such options, and no file named, no YAML is read

    file: PathText = key("the YAML file of the run", "train.yml")


# Of a GGUF file, as `gguf/file_types.py` has them in capitals.
LargeTypes = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"
]
SmallTypes = Literal["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_nl", "iq4_xs"]  # at their best with --imatrix
Types = Literal[LargeTypes, SmallTypes]
GgufType = Annotated[Types, BeforeValidator(lambda name: str(name).strip().lower())]


def split_at_commas(given: str | list[str]) -> list[str]:
    """["a,b", "[c, d]"] -> ["a", "b", "c", "d"]. Brackets around names say nothing more than the commas do."""
    return [name.strip(" '\"") for text in as_list(given) for name in str(text).strip("[] ").split(",") if name.strip()]


T = TypeVar("T")
AtCommas = Annotated[Many[T], BeforeValidator(split_at_commas)]
GgufTypes = AtCommas[GgufType]
RowLength = Annotated[int, Field(ge=2, le=1_000_000)]
Base = Literal["nf4", "original"]
Dtype = Literal["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]
# Keys of a run that say which of its texts are held out, and how they are read.
HELD_OUT: tuple[str, ...] = ("datasets", "test_datasets", "val_set_size", "sequence_len", "train_on_inputs", "seed")
HELD_OUT += ("chat_template", "chat_template_jinja", "default_system_message", "dataset_prepared_path")


class TrainOptions(RunOptions):
    """QLoRA fine-tuning: the run that a YAML file describes."""

    plan: bool = key("train nothing: print what would happen, what it needs and how long it takes", False)
    rehearse: bool = key("train nothing: do once, and undo, all that a run does until its GGUF file is there", False)

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if self.plan and self.rehearse:
            raise UserError("command line: --plan and --rehearse are two commands. Give one after the other.")
        return self


class MergeOptions(RunOptions):
    """Fold an adapter into its base: W + s B A, written as a Hugging Face folder that any tool loads."""

    reads: ClassVar = ("base_model", "output_dir", *HELD_OUT)
    alone: ClassVar = ("model adapter",)

    model: PathText | None = key("the base: Hugging Face folder or .gguf file; unset: base_model", None)
    adapter: PathText | None = key("folder or hub name of the trained adapter; unset: output_dir", None)
    out: PathText | None = key("folder to write, new or of an earlier merge; unset: merged, in output_dir", None)
    base: Base | None = key("nf4: the values of training; original: before quantisation; unset: as in training", None)
    dtype: Dtype | None = key("of the merged weights; unset: what training computed in", None)
    max_shard_size: float = key("GB in a file of the output", 5.0, gt=0)
    data: PathText | None = key("held-out texts for the certificate; unset: those of the run in the YAML file", None)
    types: GgufTypes = key("GGUF types to score as well, as q8_0,q4_k_m", ())
    max_kl: float | None = key("nats a token; above it nothing is written; unset: 0.05 for --base nf4", None)
    max_tokens: int = key("held-out tokens to score on; 0: no scores", 1024, ge=0)
    other_base: bool = key("merge onto other weights than those that the adapter was trained on", False)


class ExportOptions(RunOptions):
    """Write a model, or an adapter alone, as a .gguf file for llama.cpp and Ollama, with a Modelfile."""

    reads: ClassVar = ("base_model", "output_dir", *HELD_OUT)
    alone: ClassVar = ("model", "adapter")

    model: PathText | None = key("Hugging Face folder, with --adapter its base; unset: merged, in output_dir", None)
    adapter: PathText | None = key("trained adapter (folder or hub name) to write alone; its base is --model", None)
    out: PathText | None = key("file to write; unset: model-TYPE.gguf in output_dir, or in the --model folder", None)
    type: GgufType | None = key("how weights are stored; unset: q8_0, of an adapter f32", None)
    imatrix: PathText | None = key("importance matrix: llama.cpp's file, or alone: measured on the run's texts", None)
    prove: bool = key("read the file back and compare it with what was trained; the result is in merge.json", False)
    data: PathText | None = key("held-out texts for --prove; unset: those of the run in the YAML file", None)
    max_tokens: int = key("held-out tokens for --prove", 1024, ge=0)
    other_base: bool = key("with --adapter: onto other weights than those that it was trained on", False)


class ModelOptions(Keys):
    """A model to use, as `load_for_use` takes it."""

    model: PathText = key("Hugging Face folder, .gguf file, or hub name")
    adapter: PathText | None = key("folder or hub name of a trained adapter", None)
    other_base: bool = key("use an adapter on other weights than those that it was trained on", False)
    load_in_4bit: bool = key("quantise the linear layers to NF4, as training did", False)
    keep_gguf_blocks: bool = key("keep them in the blocks of the .gguf file, as such a training did", False)
    bf16: bool | Literal["auto"] = key("compute in bfloat16; auto: where the hardware has it", "auto")


class EvaluateOptions(ModelOptions):
    """Loss and perplexity on a data file."""

    data: PathText = key("a file, folder or glob of JSON, CSV, Parquet or text")
    split: str | None = key("split of a folder, or a part of one, as test[:20%]; unset: train", None)
    out: PathText | None = key("write a row per sample there: nll in nats, number of supervised tokens", None)


class ChatOptions(ModelOptions):
    """Talk to a model in the terminal."""

    prompt: str | None = key("answer this once and leave", None)
    system: str | None = key("system message", None)
    temperature: float = key("0 takes the most likely token always", 0.7, ge=0, le=1000)
    max_new_tokens: int = key("tokens of an answer, at most", 256, ge=1)
    seed: int = key("of the tokens that are drawn", 0, ge=0, le=4294967295)


class CompareOptions(Keys):
    """Runs side by side: how their settings differ, what came out, and their curves in one picture."""

    positional: ClassVar = ("runs",)

    runs: Many[PathText] = key("output_dir of each run")
    out: PathText = key("the picture", "compare.png")


class AskOptions(Keys):
    """Ask a GGUF file one question in llama.cpp; greedy."""

    positional: ClassVar = ("model", "question")

    model: PathText = key("the .gguf file")
    question: str = key("a message of the user")
    max_tokens: int = key("tokens of the answer, at most", 80, ge=1)


class BenchOptions(Keys):
    """How fast a training step is, and how far from the fastest that this machine could do it."""

    model: PathText = key("llama3-1b, -3b, -8b, -70b or -405b with random weights, folder or .gguf file", "llama3-8b")
    micro_batch_size: int = key("rows per GPU in one forward", 4, ge=1)
    sequence_len: int = key("tokens in a row", 2048, ge=2)
    lora_r: int = key("rank of the update", 64, ge=1)
    lora_alpha: float = key("the update is scaled by lora_alpha / lora_r", 32.0, gt=0)
    lora_dropout: float = key("share of an adapter's inputs that is dropped", 0.0, ge=0, lt=1)
    lora_target_modules: AtCommas[str] = key("ends of names, at commas; by default all linear layers", ())
    peft_use_dora: bool = key("as in train.py", False)
    gradient_checkpointing: bool | Literal["auto", "offload"] = key("as in train.py", "auto")
    fp8: bool | Literal["backward"] = key("as in train.py", False)
    fsdp: Literal["auto", "replicate", "full_shard"] = key("as in train.py", "auto")
    fsdp_version: Literal[1, 2] | None = key("as in train.py", None)
    memory_gib: float = key("of a GPU that may be used; 0: all", 0.0, ge=0)
    shard_optimizer_state: bool = key("each rank keeps its part of AdamW's state", False)
    optimizer: str = key("as in train.py", "adamw_torch_fused")
    packed: bool = key("rows of several documents of uneven length", False)
    row_lengths: AtCommas[RowLength] = key("lengths, at commas: of rows of one document, in turn, not padded", ())
    bf16: bool | Literal["auto"] = key("compute in bfloat16; auto: where the hardware has it", "auto")
    steps: int = key("steps to measure", 10, ge=1)
    peer: Many[str] = key("a command to measure first, whose last line is JSON", ())
    deploy: PathText | None = key("instead: how fast the results in this output_dir answer", None)
    decode: bool = key("instead: how fast this model with its adapter answers", False)
    json_file: PathText | None = key("write the figures to this file", None, alias="json")

    @model_validator(mode="after")
    def _every_option_is_used(self) -> Self:
        given, of_steps = self.model_fields_set, {"packed", "row_lengths", "steps", "peer"}
        unused = {
            "deploy": given - {"deploy", "json_file"},
            "decode": given & of_steps,
            "row_lengths": given & {"packed"},
        }
        for name, others in unused.items():
            if getattr(self, name) and others:
                found = ", ".join(f"--{other}" for other in sorted(others))
                raise UserError(f"command line: --{name} does not use {found}. Leave out one or the other.")
        return self
