"""What ranks of `test_bench_parallel.py` run: the suite's schemes, and wrong ones beside them."""

from bench.suites import parallel_ranks
from bench.suites.parallel_ranks import REFERENCE, Sharing
from bench.suites.upstream_exchange import UpstreamExchange

parallel_ranks.RUN_SECONDS = 0.02
usual = parallel_ranks.schemes


class Wrong(UpstreamExchange):
    """Attention's output is one percent too large."""

    def attend(self, layer, qkv, rope, tokens):
        return 1.01 * super().attend(layer, qkv, rope, tokens)


class Chatty(UpstreamExchange):
    """Something is sent that nobody needs."""

    def attend(self, layer, qkv, rope, tokens):
        self._to_heads(qkv[:, :, 0])
        return super().attend(layer, qkv, rope, tokens)


class Narrow(UpstreamExchange):
    """Four heads for three ranks, as it says."""

    def clip(self, tokens, heads, device):
        return UpstreamExchange(3, 0, self.sparse_n, self.everyone).clip(tokens, heads, device)


def with_wrong_ones(group, *given):
    found = usual(group, *given)
    upstream = found[REFERENCE]
    for name, kind in (("wrong", Wrong), ("chatty", Chatty), ("narrow", Narrow)):
        exchange = kind(group.size, group.rank, upstream.exchange.sparse_n, upstream.exchange.everyone)
        found[name] = Sharing(exchange, name, upstream.sent)
    return found


if __name__ == "__main__":
    parallel_ranks.schemes = with_wrong_ones
    parallel_ranks.main()
