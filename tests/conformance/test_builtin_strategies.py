"""Everything that the core offers keeps the contract, whatever it is."""

from tokenprune.plugins import CORE, registry
from tokenprune.testing import parametrize_with_checks

KNOWN = registry()


@parametrize_with_checks(
    offer.plugin.factory for offer in (*KNOWN.scorers, *KNOWN.reducers) if offer.origin == CORE
)
def test_contract(case, check):
    check(case)
