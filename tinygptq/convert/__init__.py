"""Other people's files to folders that the rest of tinygptq, and everything else, can read: :func:`convert`.

What is read becomes a :class:`~tinygptq.convert.source.Source` (AWQ, every generation of GPTQ), which is then written as
GPTQ or as floats; GGUF files and PyTorch pickles become Hugging Face folders of floats directly.
"""

from tinygptq.convert.dispatch import Converted, convert

__all__ = ["Converted", "convert"]
