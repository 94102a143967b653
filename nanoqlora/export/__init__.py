"""What leaves a run: merged weights in each form, GGUF files, Ollama's template, and the proof of what is in them.

    merge.py                                                 an adapter merged into its base
    gguf_model.py, tokenizer_metadata.py                     model or adapter, and vocabulary, as GGUF; the Modelfile
    go_template.py                                           the prompt in Ollama's template language
    forms.py, certificate.py                                 each form of the model, scored on held-out texts
    proof.py, llama_cpp.py                                   a GGUF file, asked by our reader and by real llama.cpp
    answer_speed.py, serving.py                              how fast each form answers, and which one to serve

Not here: the file format (`gguf/`). Read first: `certificate.py`.
"""
