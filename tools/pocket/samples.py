"""The pictures in `sample_data/`: a subject and a style that the base never saw, drawn large, with captions.

python -m tools.pocket.samples sample_data
"""

from __future__ import annotations

import argparse
from pathlib import Path

from personalize.io import write_text

from .proof.tasks import Task, style_task, subject_task
from .world import SUBJECTS

SIDE = 256  # pixels: large enough to look at in a file browser
SUBJECT, STYLE = "scarf cat", "stained glass"

README = """# Sample data

A subject and a style that the embedded base model `pocket` has never seen, drawn like its training scenes, with captions.

| folder | images | what | trigger |
| --- | --- | --- | --- |
| `subject/` | {subjects} | {looks} | `{subject.trigger}`, class `{subject.class_name}` |
| `style/` | {styles} | images in the style *{style.name}* | `{style.trigger}` |

Train on them:

    personalize train sample_data/subject --trigger {subject.trigger} --class {subject.class_name} --preset pocket-subject
    personalize train sample_data/style --trigger {style.trigger} --preset pocket-style

Made by `python -m tools.pocket.samples sample_data`, always the same bytes with the same Pillow.
"""


def write_samples(folder: Path) -> None:
    """Write both folders and their README."""
    subject, style = subject_task(SUBJECT), style_task(STYLE)
    for kind, task in (("subject", subject), ("style", style)):
        task.write(folder / kind, SIDE)
    write_text(folder / "README.md", readme(subject, style))


def readme(subject: Task, style: Task) -> str:
    """What lies in the folder, and what to do with it."""
    looks = SUBJECTS[subject.name].looks
    return README.format(subject=subject, style=style, looks=looks, subjects=len(subject.lessons), styles=len(style.lessons))


def main() -> None:
    """Write the sample data."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.samples", description=__doc__)
    parser.add_argument("folder", type=Path)
    write_samples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
