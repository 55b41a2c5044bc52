"""What runs a distillation: data, stages, checkpoints, evaluation; `distill.py` puts it together.

command_line   flags from a dataclass
sources, turns, media, conversations, samples, data    rows to conversations to tensors
run            one distillation and its folder
stage_trainer, guards, shares, progress, metrics, whole_writes    one stage, safe against kills and NaN
variants, ablation    what flags can change, and what each change costs
evaluation, reliance, judge, plots    how well a student does
dry_run, memory, description    what would be done, in how much memory
"""

import transformers  # noqa: F401  # its import registers the students, which needs this package's modules whole
