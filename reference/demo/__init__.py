"""A real teacher, small enough to bundle, and the real images it was trained on.

digits     handwritten digits and pictures made of them
scenes     nine kinds of questions: local detail, global context, time
questions  the endless data set
film       a film of digits without end
train_teacher, ask   commands: make the teacher, ask a model about a picture
train_watcher, watch   commands: teach a student to watch, play a film through it
"""

from pathlib import Path

from .questions import KINDS, DigitsQuestions

TEACHER = Path(__file__).parent / "teacher"

__all__ = ["KINDS", "TEACHER", "DigitsQuestions"]
