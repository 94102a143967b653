"""From files to batches: rows, prompts, label masks, samples, packed rows.

    files.py, rows.py                  a data set's name -> files -> rows
    row_format.py, messages.py         what the columns of a row mean; the messages of a chat
    prompts.py, masks.py               a row -> token ids, and which of them are supervised
    templates/                         the chat templates that can be named in a configuration
    completeness.py, special_rows.py   checks: the template left nothing out; special tokens were trained
    prepare.py                         all rows -> samples, in several processes, kept on the disk
    packing.py, batches.py             samples -> the schedule of all steps -> tensors

Not here: text to ids and chat templates (`tokenizer/`). Read first: `prompts.py`.
"""
