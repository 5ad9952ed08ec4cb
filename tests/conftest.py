"""One thread per test process: the suite runs with as many processes as there are cores."""

import gc

import torch

torch.set_num_threads(1)
# torch's modules are here to stay: searching them for garbage again and again took a tenth of the time of a trace
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 50)
