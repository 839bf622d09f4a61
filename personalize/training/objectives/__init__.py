"""Objectives: what a batch's loss is. objective.py has the interface; each class of denoise.py and prior.py is a row."""
