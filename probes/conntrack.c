/* Which packets does conntrack itself refuse?
 *
 * Hook:    kprobe and kretprobe on __nf_conntrack_confirm (each new connection), kretprobes on nf_ct_resolve_clash
 *          and early_drop (only where something fails). Optional: drops.c tells the same from statistics without it.
 * Counts:  nothing itself. It marks the packet of this CPU, which kfree_skb finds marked a moment later; a race that
 *          was repaired drops no packet, and is counted by its flow in `resolved`, twice, like the drops.
 * Cost:    printed by scripts/bench (kprobe): the pair on confirm, per new connection.
 * Blind:   a softirq between entry and return may put its own packet in the place of this CPU's: then the mark fits
 *          no packet, and what statistics tell stands alone. */

struct registers {
	u64 at[21];
};

struct refusal {
	u64 confirming;	 /* skb on its way through confirm, or clash resolution */
	u64 failed;	 /* skb whose connection was not inserted */
	u32 is_clash;	 /* its clash was not to be resolved */
	u32 full;	 /* nothing could be evicted for a packet that is about to be dropped */
};
BPF_PERCPU_ARRAY(refusals, struct refusal, 1);

INLINE struct refusal *this_refusal(void)
{
	u32 zero = 0;
	return refusals.lookup(&zero);
}

int on_confirm(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (r) {
		r->confirming = ctx->at[ARGUMENT_1];
		r->is_clash = 0;
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

int on_clash_over(struct registers *ctx)
{
	struct refusal *r = this_refusal();
	if (r && (u32)ctx->at[RETURNED] == 0)
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
		if (verdict == VERDICT_UNKNOWN || verdict == VERDICT_NONE)
			verdict = r->is_clash ? VERDICT_CLASH : VERDICT_INSERT_FAILED;
		return verdict | PROBED;
	}
	if (r->full && conntrack == CONNTRACK_NONE && verdict != VERDICT_RULE) {
		r->full = 0;
		return VERDICT_REFUSED | PROBED;
	}
	return verdict;
}
