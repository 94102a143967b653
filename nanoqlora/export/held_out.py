"""The texts that certificates are made on: what the run kept away from training.

They are named by the user: a file, or the YAML of the run on the command line. The train.yml in an adapter's folder is
not asked: the folder may come from anybody, and a configuration decides which files are read and written.
"""

from dataclasses import replace

from ..config.errors import UserError
from ..config.schema import Config
from ..data.files import find_files
from ..data.prepare import Encoding, read_samples
from ..data.prompts import PromptFormat
from ..run.inputs import data_files, encoding_of, prepare_data
from ..tokenizer.tokenizer import Tokenizer
from .certificate import Texts

LIMIT = 4096  # tokens of a text when no run says sequence_len


def held_out_texts(
    config: Config | None, tokenizer: Tokenizer, prompt_format: PromptFormat | None, data: str | None, max_tokens: int
) -> tuple[str, Texts] | None:
    """What was held out, by its name, or None with a line that names the reason.

    Args:
        config: of the run, from the YAML that the user named; None: no YAML was named.
        prompt_format: of the run, for `data`.
        data: a file that the user names; it wins.
        max_tokens: the first samples, up to so many tokens.
    Raises:
        UserError: `data` cannot be read. The run's own data may be missing by now.
    """
    if data:
        reading = read_samples(find_files(data), Encoding(prompt_format, tokenizer, LIMIT, "drop"))
        return data, Texts.of(reading.samples, max_tokens)
    if config is None:
        print("Nothing is scored: no held-out texts are named. Give a file with --data, or the run's YAML file first.")
        return None
    try:
        return _of_run(config, tokenizer, max_tokens)
    except UserError as error:
        print(f"Nothing is scored, because the run has no held-out data to read: {error} Name a file with --data.")
        return None


def _of_run(config: Config, tokenizer: Tokenizer, max_tokens: int) -> tuple[str, Texts]:
    if config.test_datasets:
        dataset = config.test_datasets[0]
        encoding = replace(encoding_of(config, dataset, tokenizer), strategy="drop")
        return dataset.path, Texts.of(read_samples(data_files(dataset), encoding).samples, max_tokens)
    if config.val_set_size:
        return f"val_set_size {config.val_set_size}", Texts.of(prepare_data(config, tokenizer, 1).held_out, max_tokens)
    raise UserError("its YAML has neither test_datasets nor val_set_size.")
