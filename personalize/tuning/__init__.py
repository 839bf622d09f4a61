"""What learns on a base: adapters on its layers.

tunable.py    the interface that training works with      attach.py     loaded or fresh adapters on a base
layers.py     the one adapter layer                        fleet.py      adapters that train, one or many
targets.py    which layers carry an adapter                scheduled.py  strengths that change from step to step
placement.py  layers in the place of the base's own     continued.py  a LoRA that starts as another adapter
"""
