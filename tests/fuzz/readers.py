"""All readers: name -> how a wrong input is made, and how it is read."""

import read_adapters
import read_data
import read_models
import read_settings
import read_tokenizers

READERS = read_models.READERS | read_tokenizers.READERS | read_adapters.READERS | read_data.READERS
READERS |= read_settings.READERS
GENERATED = ("guard", "words", "modelfile")  # whose inputs have a shape of their own, so they are only made
