"""A model on one NVIDIA GPU (extra ``[cuda]``): ``engine`` is the entrance, ``weights`` brings a folder's weights there,
``prefill`` runs prompts, ``decode`` is a step as one CUDA graph, ``model`` gives the logits of every position. The kernels
are in :mod:`tinygptq.kernels.cuda`.
"""
