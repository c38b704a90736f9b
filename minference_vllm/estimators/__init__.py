# SPDX-License-Identifier: Apache-2.0
"""How the kept keys are chosen: one module a method, one line here."""

from minference_vllm.estimators.vertical_slash import vertical_slash

ESTIMATORS = {"vertical_slash": vertical_slash}
