"""What is not shipped: benchmarks, the embedded base's world and how it is trained, its judge and figures, fuzzing."""
