"""OpenVLA as a package: the waist, the model, the data, the simulator. Scripts import it; it imports none of them."""

import logging

# peft imports torchao and bitsandbytes, which warn at every start of what isn't used here.
for _name in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
