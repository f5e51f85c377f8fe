"""Products with packed weights: reference.py is the definition, cpu.py its fast twin.

From the top down: cpu.py (linears and the functions between them) and cpu_plan.py (a decode step as a list of tasks) make
jobs; cpu_launch.py runs a job's parts in parallel; cpu_rows.py, cpu_decode.py, cpu_layout.py, cpu_attention.py and
cpu_tiles.py are what a part does, compiled; simd.py is the vector code they are written in.
"""
