"""GGUF, the one-file format of llama.cpp and Ollama: the file itself, and the formats of the numbers in it.

    container.py      what a file consists of            reader.py, writer.py    in and out
    names.py          tensor names and row order         config.py               config.json <-> metadata
    ggml_blocks.py    4 to 8 bits a weight               small_blocks.py         2 and 3, and uneven steps
    k_quants.py       the search for scales              bits.py                 arithmetic as in C
    file_types.py     which tensor gets which format     modelfile.py            Ollama's Modelfile

Not here: how a model, an adapter or a tokenizer becomes such a file (`export/`). Read first: `container.py`.
"""
