"""Weights in files, in and out, one tensor at a time.

    checkpoint.py    Hugging Face folders and GGUF files    meta.py           Meta's own folder
    pretrained.py    a Llama filled from one of them        hub.py            models by their name on the hub
    adapter.py       LoRA in PEFT's layout                  tensor_files.py   files that may come from anybody

Not here: the GGUF format itself (`gguf/`), and writing it (`export/`). Read first: `checkpoint.py`.
"""
