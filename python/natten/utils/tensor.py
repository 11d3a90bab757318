# SPDX-License-Identifier: MIT
"""Where NATTEN 0.17 has what is in natten.utils.checks and natten.utils.misc."""

from .checks import check_additional_keys as check_additional_keys
from .checks import check_additional_values as check_additional_values
from .misc import make_attn_tensor_from_input as make_attn_tensor_from_input
