"""Benchmarks beside other tools. They run as processes of their own, all under the same conditions; none is part of this project.

python -m tools.bench algebra --kohya FOLDER    # merge and resize beside kohya's sd-scripts and peft
"""
