"""Chains of least latency under a floor on throughput: the inner problem of the exact front.

A floor of `r` tokens per second allows server `s` at most `block_rate[s] / r` blocks and
`hop_rate[s] / r` visits in the whole chain. Counting over the whole chain is what makes this hard:
with one block per server it is a travelling salesman's problem. So it is solved in three steps,
each used only where the one before leaves a gap:

- `run_graph.py`: limit every run on its own and forget earlier visits. A dynamic programme; a lower
  bound always, and the answer whenever its chain keeps the limits anyway.
- `lagrangian.py`: price the limits that were broken, which raises the bound.
- `label_setting.py`: count the broken limits exactly, searching only what the bound leaves.

`large_neighbourhood_search.py` changes parts of good chains, which finds chains where proofs are
out of reach. `epsilon_constraint.py` puts floor after floor, and `search_budget.py` bounds the
effort of all of it together. docs/exact_and_evolution.md explains the method. Others import `sweep`
from here, and nothing from the files inside.
"""

from planetserve.routing.exact.epsilon_constraint import DEFAULT_EFFORT, Swept, gap_of, sweep

__all__ = ["DEFAULT_EFFORT", "Swept", "gap_of", "sweep"]
