"""What the user gives, and how he is answered: YAML keys, the command line, errors, exit codes, files.

    schema.py      every key: type, default, meaning     keys.py, rules.py     other keys; how keys go together
    parser.py      YAML and words to dataclasses         load.py               a command line to a Config
    errors.py      UserError, and text for a terminal    files.py              files appear complete or not at all
    commands.py    exit codes, what every command shares

Every other package imports from here, and this one imports none of them, and never PyTorch. Read first: `schema.py`.
"""
