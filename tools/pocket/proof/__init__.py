"""Proof, in figures: does the base do what a prompt says, and does a personalized base know its subject or style?

    python -m tools.pocket.proof base               # prompt obedience on seen and held-out combinations
    python -m tools.pocket.proof personalization    # every unseen subject and style, trained and measured
    python -m tools.pocket.proof choice             # is the checkpoint that was chosen the best one?
    python -m tools.pocket.proof peer --script ...  # beside diffusers' train_dreambooth_lora.py

Every figure is the judge's, and stands between a floor and a ceiling: what it says of noise or of the base, and of true renders.
"""
