"""What surrounds the training loop of `train.py`.

    before    inputs.py (data), cadence.py, doubts.py, forecast.py, rehearsal.py, preview.py, output_dir.py
    during    state.py, optim.py, optimizer_state.py, neftune.py, log.py, trackers.py, early_stopping.py, stopping.py,
              checkpoints.py, not_finite.py
    after     results.py, report.py, figure.py, quality.py; compare.py, several runs side by side
    a model in use    usable.py (load all that is needed), generate.py (answers), scoring.py (losses)

Not here: the loop. Read first: `train.py`, then `state.py`.
"""
