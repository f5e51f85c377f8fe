"""Products with packed weights: reference.py is the definition, cpu.py its fast twin."""
