"""
Evaluate tokenizers and generators. Functions return numbers and never print. Long ones call `progress_callback` with the
number of images processed since the last call.

`vfmtok evaluate` calls `reconstruction`, `generation`, `linear_probe` and `tokens`. These use `features` and `metrics`;
`results` writes tables. Images are read by `vfmtok_hf.data`.
"""
