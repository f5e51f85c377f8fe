"""Products with packed weights: reference.py is the definition, cpu.py its fast twin.

From the top down: cpu.py (linears and the functions between them) and cpu_plan.py (a decode step as a list of tasks) make
jobs; cpu_launch.py runs a job's parts in parallel; what a part does, compiled, is in cpu_tiles.py and cpu_decode.py (few
rows), cpu_products.py and cpu_rows.py (many), cpu_attention.py and cpu_prompt_attention.py, and cpu_layout.py (codes);
simd.py is the vector code they are written in.
"""
