"""The parts of `python -m linmu.optimized.benchmark`.

timing      how a call is timed, and what the device can do at most
counts      the operations and bytes that a job needs, whoever does it
problems    the inputs: a prompt that is mostly one video
peers       what a user would call today instead, checked before it is timed
cases       one line of a table, and the loop that runs lines within a budget
kernels     scan and window attention            models     time to first token
decoding    tokens per second after a prompt     training   tokens per second of each stage
results     ratios, growth, crossover            report     Markdown, JSON, plots
"""
