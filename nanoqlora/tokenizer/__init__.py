"""Text to token ids and back, and the chat templates that come with tokenizers.

    tokenizer.py         Tokenizer, load_tokenizer           files.py                  where vocabularies come from
    byte_pairs.py        byte-level BPE (Llama-3)            sentencepieces.py         sentencepiece BPE (Llama-2)
    tokenizer_json.py    what tokenizer.json asks for        vocabulary.py             tokens, pieces, kinds
    chat_template.py     Jinja, in a sandbox                 traced.py                 text with its sources

Read first: `tokenizer.py`.
"""
