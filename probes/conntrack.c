/* Which packets does conntrack itself refuse?
 *
 * Hook:    kprobe and kretprobe on __nf_conntrack_confirm (each new connection); where something fails, kprobe and
 *          kretprobe on nf_ct_resolve_clash, kretprobe on early_drop.
 *          Optional: without it drops.c tells refusals from statistics, and statistics count the rest by namespace.
 * Counts:  races that were repaired, which drop no packet: by flow in the hash map `repairs`, which exists twice like
 *          the drops'. What does drop one, it marks: kfree_skb finds this CPU's packet marked a moment later.
 * Cost:    printed by scripts/bench (kprobe): the pair on confirm, per new connection.
 * Blind:   a softirq between entry and return may put its own packet in the place of this CPU's: then the mark fits
 *          no packet, and what statistics tell stands alone. */

struct registers {
	u64 at[21];
};

struct refusal {
	u64 confirming;	 /* skb on its way through confirm */
	u64 clashing;	 /* skb on its way through clash resolution */
	u64 failed;	 /* skb whose connection was not inserted */
	u32 is_clash;	 /* its clash was not to be resolved */
	u32 full;	 /* nothing could be evicted for a packet that is about to be dropped */
};
BPF_PERCPU_ARRAY(refusals, struct refusal, 1);
BPF_TABLE("percpu_hash", struct flow_key, struct tally, repairs_0, REPAIRS);
BPF_TABLE("percpu_hash", struct flow_key, struct tally, repairs_1, REPAIRS);

INLINE struct refusal *this_refusal(void)
{
	u32 zero = 0;
	return refusals.lookup(&zero);
}

/* A packet whose clash was resolved lives on. Where the map has no room its flow is left out: the statistics of the
 * namespace have it. */
INLINE int count_repair(u64 at)
{
	struct skb_view skb;
	struct flow_key flow = {};
	struct tally one = {.skbs = 1, .packets = 1}, *have;
	u32 zero = 0;
	u64 dev = 0;
	struct control *now = control.lookup(&zero);
	if (!now || !at || READ(&skb, at + SKB_AT) || READ(&dev, at + OFF_sk_buff_dev))
		return 0;
	if (SKB(&skb, u16, network_header))
		read_flow(&flow, SKB(&skb, u64, head) + SKB(&skb, u16, network_header),
			  __builtin_bswap16(SKB(&skb, u16, protocol)));
	read_conntrack(&flow, SKB(&skb, u64, _nfct)); /* or its sender would be the address it is translated to */
	fill_netns((struct drop_key *)&flow, at, &skb, dev, 0);
	flow.iif = SKB(&skb, u32, skb_iif);
	flow.hook = flow.iif == flow.ifindex ? HOOK_LOCAL_IN : HOOK_POST_ROUTING; /* connections are confirmed at these */
	flow.verdict = VERDICT_CLASH_RESOLVED | PROBED;
	have = now->side ? repairs_1.lookup(&flow) : repairs_0.lookup(&flow);
	if (have) {
		__sync_fetch_and_add(&have->skbs, 1);
		return 0;
	}
	one.bytes = SKB(&skb, u32, len);
	if (flow.net)
		read_netns(&one, flow.net);
	if (now->side)
		repairs_1.insert(&flow, &one);
	else
		repairs_0.insert(&flow, &one);
	return 0;
}

int on_confirm(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (r) {
		r->confirming = ctx->at[ARGUMENT_1];
		r->failed = r->is_clash = r->full = 0; /* marks of packets that nobody saw dropped */
	}
	return 0;
}

int on_confirmed(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (r && (u32)ctx->at[RETURNED] == 0) /* NF_DROP */
		r->failed = r->confirming;
	return 0;
}

int on_clash(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (r)
		r->clashing = ctx->at[ARGUMENT_1];
	return 0;
}

int on_clash_over(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (!r)
		return 0;
	if ((u32)ctx->at[RETURNED] != 0)
		return count_repair(r->clashing);
	r->is_clash = 1;
	return 0;
}

int on_evicted(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (r && (u8)ctx->at[RETURNED] == 0)
		r->full = 1;
	return 0;
}

/* The verdict that statistics gave, and PROBED where a probe on this CPU saw this packet refused. */
INLINE u8 probed_verdict(u8 verdict, u64 skb, u8 conntrack)
{
	struct refusal *r = this_refusal();
	if (!r)
		return verdict;
	if (r->failed == skb && verdict != VERDICT_RULE) {
		r->failed = 0;
		if (verdict != VERDICT_UNKNOWN && verdict != VERDICT_NONE)
			return verdict | PROBED;
		return r->is_clash ? VERDICT_CLASH | PROBED : VERDICT_UNKNOWN; /* dying, or the chain was too long */
	}
	if (r->full && conntrack == CONNTRACK_NONE && verdict != VERDICT_RULE) {
		r->full = 0;
		return VERDICT_REFUSED | PROBED;
	}
	return verdict;
}
