"""Distil a vision-language model into LinMU, in three stages (LinMU, arXiv 2601.01322).

    python distill.py                                          the bundled teacher, on a CPU, in minutes
    python distill.py --teacher DIR_OR_HUB_ID --data FILE.jsonl --preset vlm --output runs/mine
    python distill.py evaluate STUDENT --data FILE.jsonl       a student's folder, measured
    python distill.py quantise STUDENT                         the same in 8 and 4 bits, beside itself
    python distill.py benchmark STUDENT --tasks mmmu_val       the same on tasks of lmms-eval
    python distill.py ablate                                   the first with one thing left out at a time

reference/training/ has the settings in config.py, their defaults in presets.py, the stages in stages.py.
Where LinMU is installed, `python -m linmu.reference.training` does the same.
"""

from linmu.reference.training.commands.main import run_command

if __name__ == "__main__":
    run_command()
