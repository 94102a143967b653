"""What the user gives, and how he is answered: YAML keys, the command line, errors, exit codes, files.

    schema.py      every key: type, default, meaning     options.py       the same of each command's own options
    keys.py        one map: its keys checked, described  axolotl_keys.yml what becomes of Axolotl's other keys
    rules.py, .yml how the keys of a run go together     parser.py        YAML and words to maps with line numbers
    load.py        a command line to a Config            commands.py      exit codes, what every command shares
    errors.py      UserError, and text for a terminal    files.py         files appear complete or not at all
    llama.py       a Llama's numbers from config.json

Every other package imports from here, and this one imports none of them, and never PyTorch. Read first: `schema.py`.
"""
