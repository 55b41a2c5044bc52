"""A real teacher, small enough to bundle, and the real images it was trained on.

digits     handwritten digits and pictures made of them
scenes     nine kinds of questions: local detail, global context, time
questions  the endless data set
film       a film of digits without end
train_teacher, train_watcher, ask, watch   commands: make the teacher, a student that watches; ask; play a film
"""

from pathlib import Path

from .questions import KINDS, DigitsQuestions

TEACHER = Path(__file__).parent / "teacher"

__all__ = ["KINDS", "TEACHER", "DigitsQuestions"]
