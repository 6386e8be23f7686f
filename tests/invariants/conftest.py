"""One thread: the tests of the science are small, and threads would only fight over cores."""

import torch

torch.set_num_threads(1)
