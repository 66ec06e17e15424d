"""
Measure tokenizers and generators. Functions return numbers and never print; what takes long reports to an `advance`
callback.

`reconstruction`, `generation`, `linear_probe` and `tokens` are what `vfmtok evaluate` offers; `images`, `features` and
`metrics` are what they are made of; `plots` draws and `results` writes tables.
"""
