"""What evidence is worth: short runs of invented individuals and looks, good and bad, each with the truth that a judge tells.

python -m tools.pocket.calibration runs --work runs/calibration      # hours on one core, resumable
python -m tools.pocket.calibration fit --work runs/calibration       # writes personalize/pocket/verdict.json
python -m tools.pocket.calibration copying --work runs/calibration   # the mark for copies: prints a table, trains two runs once
"""
