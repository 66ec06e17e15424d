"""
Measure tokenizers and generators. Functions return numbers and never print; long ones call `progress_callback` with the
number of images done since the last call.

`reconstruction`, `generation`, `linear_probe` and `tokens` are what `vfmtok evaluate` offers; `features` and `metrics` are
what they are made of; `results` writes tables. Images come from `vfmtok_hf.data`.
"""
