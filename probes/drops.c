/* Which packets does this machine throw away, whose are they, and where in the kernel?
 *
 * Hook:    raw tracepoint kfree_skb; 2, 3 or 4 arguments by kernel (-DKFREE_ARGS, from BTF).
 * Counts:  every drop once, per CPU: in a slot, else in the hash map `flows` with addresses and ports, or, once that
 *          has no room, in `drops`, keyed by what explains a drop. All exist twice; user space switches and drains.
 * Cost:    printed by scripts/bench; a netfilter drop whose hook is not told by its route takes a stack.
 * Blind:   drops that consume_skb() hides (SYN at a full queue), native XDP, NIC rings: counters show those. What
 *          conntrack refuses elsewhere than at a hook (reinjected from NFQUEUE, in Open vSwitch) has no verdict, and
 *          the next netfilter drop there on that CPU gets it. */

struct slot {
	struct flow_key flow;
	struct tally tally;
};

BPF_TABLE("percpu_hash", struct flow_key, struct tally, flows_0, FLOWS);
BPF_TABLE("percpu_hash", struct flow_key, struct tally, flows_1, FLOWS);
BPF_TABLE("percpu_hash", struct drop_key, struct tally, drops_0, DROPS);
BPF_TABLE("percpu_hash", struct drop_key, struct tally, drops_1, DROPS);
BPF_RINGBUF_OUTPUT(samples, SAMPLE_PAGES);
#ifdef OFF_net_ct_stat
BPF_TABLE("lru_percpu_hash", u64, struct conntrack_seen, seen, NAMESPACES_SEEN); /* by netns_id() */
BPF_ARRAY_OF_MAPS(anchor, "budget", 1);
#endif

#ifdef RECURSION_SAFE
/* From 6.1 on the kernel never runs this program inside itself, so additions need not be atomic, and the first flow
 * of each turn to come by a slot can be counted there without the hash map. */
struct slots {
	struct slot slot[SLOTS];
};
BPF_PERCPU_ARRAY(slots_0, struct slots, 1);
BPF_PERCPU_ARRAY(slots_1, struct slots, 1);
#define ADD(to, n) (to) += (n)
#else
/* Before that, a softirq that drops may interrupt it. */
#define ADD(to, n) __sync_fetch_and_add(&(to), (n))
#endif

INLINE void add(struct tally *to, u64 packets, u64 bytes)
{
	ADD(to->skbs, 1);
	ADD(to->packets, packets);
	ADD(to->bytes, bytes);
}

INLINE int is_netfilter(u32 reason, u64 location)
{
#ifdef REASON_NETFILTER_DROP
	return reason == REASON_NETFILTER_DROP;
#else
#define WITHIN(lo, hi) if (location > lo && location <= hi) return 1;
	NETFILTER_RANGES(WITHIN)
	return 0;
#endif
}

/* The hook told by the innermost IP function in the stack. */
INLINE u8 hook_by_stack(void *ctx, struct control *control)
{
	struct budget *b = current_budget(control);
	u64 stack[HOOK_FRAMES] = {};
	if (!b || b->stacks >= control->stacks) {
		count_loss(LOSS_HOOKS);
		return HOOK_UNKNOWN;
	}
	b->stacks++;
	bpf_get_stack(ctx, stack, sizeof(stack), 2); /* without this program and bpf_trace_run() */
#ifdef RECURSION_SAFE /* a kernel whose verifier follows an index into the stack, too: compiled sooner */
#pragma clang loop unroll(disable)
#else
#pragma unroll
#endif
	for (int i = 0; i < HOOK_FRAMES; i++) {
#define FOUND(lo, hi, hook) if (stack[i] > lo && stack[i] < hi) return hook;
		HOOK_RANGES(FOUND)
	}
	return HOOK_UNKNOWN;
}

/* The hook a netfilter drop happened at. The route attached to the packet tells LOCAL_OUT, LOCAL_IN and FORWARD;
 * not so without a route yet (PRE_ROUTING, ingress, bridge), on loopback (which keeps its route), and where the
 * packet is on its way out of the route's device (POST_ROUTING, egress, or FORWARD back where it came from). */
INLINE u8 hook_of(void *ctx, struct skb_view *skb, u64 dev, struct control *control)
{
	u64 dst = SKB(skb, u64, _skb_refdst) & ~1ull, out = 0, input = 0;
	if (dst) {
		READ(&out, dst + OFF_dst_entry_dev);
		READ(&input, dst + OFF_dst_entry_input);
		if (!dev)
			return HOOK_LOCAL_OUT;
		int elsewhere = dev != out;
		if (elsewhere && (input == SYM_ip_local_deliver || input == SYM_ip6_input))
			return HOOK_LOCAL_IN;
		if (elsewhere && (input == SYM_ip_forward || input == SYM_ip6_forward))
			return HOOK_FORWARD;
	}
	return hook_by_stack(ctx, control);
}

#ifdef OFF_net_ct_stat
/* How far this CPU's per-CPU data are from what a per-CPU pointer says: as far as our own map's value for this CPU,
 * which a lookup gives, is from the per-CPU pointer in the map. Reading a pointer from memory makes it a number. */
INLINE u64 percpu_offset(void)
{
	u32 zero = 0;
	u64 at = 0, here = 0, pointer = 0;
	struct budget *b = budget.lookup(&zero);
	if (!b || b->percpu_offset)
		return b ? b->percpu_offset : 0;
	void *map = anchor.lookup(&zero);
	if (!map)
		return 0;
	if (!READ(&here, &b) && !READ(&at, &map) && !READ(&pointer, at + OFF_bpf_array_pptrs))
		b->percpu_offset = here - pointer;
	return b->percpu_offset;
}

INLINE u32 read_u32(u64 at)
{
	u32 value = 0;
	READ(&value, at);
	return value;
}

/* What was in its place before. */
INLINE u32 exchange(u32 *at, u32 now)
{
	u32 was = *at;
	*at = now;
	return was;
}

/* Which namespace it is: its cookie, which is its own for ever; before 5.12, when most have none, the inode. */
INLINE u64 netns_id(u64 net)
{
	u64 id = 0;
	u32 inode = 0;
#ifdef OFF_net_net_cookie
	if (READ(&id, net + OFF_net_net_cookie))
		return 0;
#endif
	if (!id && !READ(&inode, net + OFF_net_ns_inum))
		id = inode;
	return id;
}

/* Conntrack counts what it refuses on the CPU that refuses, a moment before the packet is freed there: what rose
 * in this namespace since the last netfilter drop on this CPU is why this one was dropped. */
INLINE u8 verdict_of(u64 net, struct control *control)
{
	u64 at = 0, netns = net ? netns_id(net) : 0;
	u32 failed, dropped, too_long = 0;
	u64 offset = netns ? percpu_offset() : 0;
	if (!offset || READ(&at, net + OFF_net_ct_stat) || !at)
		return VERDICT_UNKNOWN;
	at += offset;
	struct conntrack_seen none = {}, *last = seen.lookup(&netns);
	if (!last) {
		if (!control->baselined)
			return VERDICT_UNKNOWN;
		seen.update(&netns, &none);
		last = seen.lookup(&netns);
		if (!last)
			return VERDICT_UNKNOWN;
	}
	failed = read_u32(at + OFF_ip_conntrack_stat_insert_failed);
	dropped = read_u32(at + OFF_ip_conntrack_stat_drop);
#ifdef OFF_ip_conntrack_stat_chaintoolong
	too_long = read_u32(at + OFF_ip_conntrack_stat_chaintoolong);
	too_long -= exchange(&last->chain_too_long, too_long);
#endif
	failed -= exchange(&last->insert_failed, failed);
	dropped -= exchange(&last->drop, dropped);
	if (!failed && !dropped)
		return VERDICT_RULE;
	if (!failed && dropped == 1)
		return VERDICT_REFUSED;
	if (failed != 1 || dropped > 1)
		return VERDICT_UNKNOWN;
	if (too_long)
		return VERDICT_CHAIN_TOO_LONG;
	if (!dropped)
		return VERDICT_INSERT_FAILED;
	return VERDICT_CLASH;
}
#endif

INLINE void take_sample(void *ctx, struct flow_key *flow, struct tally *one, struct skb_view *skb,
			struct budget *b, struct control *control)
{
	u64 l3 = SKB(skb, u64, head) + SKB(skb, u16, network_header);
	u64 end = 0, linear = SKB(skb, u32, tail) - SKB(skb, u16, network_header);
	u8 h[8] = {}, protocol;
	if (!b || b->samples >= control->samples) {
		count_loss(LOSS_SAMPLES);
		return;
	}
	struct sample *s = samples.ringbuf_reserve(sizeof(struct sample));
	if (!s) {
		count_loss(LOSS_SAMPLES);
		return;
	}
	b->samples++;
	__builtin_memset(s, 0, sizeof(*s));
	__builtin_memcpy(s, flow, sizeof(*flow));
	s->netns = one->netns;
	s->netns_cookie = one->netns_cookie;
	s->t_ns = bpf_ktime_get_boot_ns();
	s->length = SKB(skb, u32, len);
	if (flow->family && !READ(&h, l3)) {
		protocol = flow->family == 2 ? flow->protocol : h[6];
		end = flow->family == 2 ? (h[0] & 15) * 4 : ipv6_transport(l3, &protocol);
		if (end && !(flow->family == 2 && (be16(h + 6) & 0x1fff)))
			end = headers_end(l3, protocol, end);
		if (end > linear)
			end = linear;
		asm volatile("" : "+r"(end)); /* or clang compares a copy and the verifier learns nothing */
		if (end > SAMPLE_BYTES)
			end = SAMPLE_BYTES;
		s->captured = end;
		bpf_probe_read_kernel(s->headers, end, (const void *)l3);
	}
	int got = bpf_get_stack(ctx, s->stack, sizeof(s->stack), 0);
	s->frames = got > 0 ? (u32)got / 8 : 0;
	samples.ringbuf_submit(s, 0);
}

INLINE int is_same(const struct flow_key *a, const struct flow_key *b)
{
	const u64 *left = (const u64 *)a, *right = (const u64 *)b;
	u64 differs = 0; /* no branches: they would cost more to compile than comparing to the end costs to run */
#pragma unroll
	for (int i = 0; i < sizeof(*a) / 8; i++)
		differs |= left[i] ^ right[i];
	return !differs;
}

/* The slot for this flow: its own, or a free one, or NULL. */
INLINE struct slot *slot_of(struct flow_key *flow, u32 side)
{
#ifdef RECURSION_SAFE
	u32 zero = 0, at = (flow->location >> 4 ^ flow->sport ^ flow->dport ^ flow->dst[15]) & (SLOTS - 1);
	struct slots *all = side ? slots_1.lookup(&zero) : slots_0.lookup(&zero);
	if (all) {
		struct slot *slot = &all->slot[at];
		if (!slot->tally.skbs || is_same(&slot->flow, flow))
			return slot;
	}
#endif
	return 0;
}

INLINE int count_known(struct flow_key *flow, u64 packets, u64 bytes, u32 side)
{
	struct slot *slot = slot_of(flow, side);
	if (slot) {
		if (slot->tally.skbs)
			add(&slot->tally, packets, bytes);
		return slot->tally.skbs != 0;
	}
	struct tally *have = side ? flows_1.lookup(flow) : flows_0.lookup(flow);
	if (have)
		add(have, packets, bytes);
	return have != 0;
}

/* A key that seems not to be counted in this turn yet. Returns 1 if only now it is in the flow map: worth a sample. */
INLINE int count_new(struct flow_key *flow, struct tally *one, struct budget *b, struct control *control)
{
	u32 side = control->side;
	struct drop_key *key = (struct drop_key *)flow; /* a flow_key begins with a drop_key */
	struct tally *have;
	struct slot *slot = slot_of(flow, side);
	if (slot && slot->tally.skbs) {
		add(&slot->tally, one->packets, one->bytes);
		return 0;
	}
	if (slot) {
		slot->flow = *flow;
		slot->tally = *one;
		return 1;
	}
	if (b && !b->flows_full) {
		if (!(side ? flows_1.insert(flow, one) : flows_0.insert(flow, one)))
			return 1;
		have = side ? flows_1.lookup(flow) : flows_0.lookup(flow);
		if (have) { /* another CPU was first */
			add(have, one->packets, one->bytes);
			return 0;
		}
		b->flows_full = 1;
	}
	have = side ? drops_1.lookup(key) : drops_0.lookup(key);
	if (!have) {
		if (!(side ? drops_1.insert(key, one) : drops_0.insert(key, one)))
			return 0;
		have = side ? drops_1.lookup(key) : drops_0.lookup(key);
	}
	if (have)
		add(have, one->packets, one->bytes);
	else
		count_loss(LOSS_KEYS);
	return 0;
}

/* A drop whose key is not counted in this turn, as far as it goes: only now it is asked which namespace it is. */
INLINE void count_unknown(void *ctx, u64 at, struct flow_key *flow, struct skb_view *skb, u64 rx_sk, u64 packets,
			  u64 bytes, struct control *control)
{
	struct drop_key *key = (struct drop_key *)flow;
	struct tally one = {.skbs = 1, .packets = packets, .bytes = bytes};
	if (key->net && !read_netns(&one, key->net)) {
		fill_netns(key, at, skb, 0, rx_sk); /* without the device, which was none */
		if (key->net && !read_netns(&one, key->net))
			key->net = 0;
	}
	struct budget *b = current_budget(control);
	if (count_new(flow, &one, b, control))
		take_sample(ctx, flow, &one, skb, b, control);
}

int on_kfree_skb(struct bpf_raw_tracepoint_args *ctx)
{
	struct skb_view skb;
	struct flow_key flow = {};
	u32 zero = 0;
	u64 dev = 0, rx_sk = 0, at = ctx->args[0];
	struct drop_key *key = (struct drop_key *)&flow;
	struct control *now = control.lookup(&zero);
	if (!now || READ(&skb, at + SKB_AT) || READ(&dev, at + OFF_sk_buff_dev))
		return 0;
	flow.location = ctx->args[1];
#if KFREE_ARGS >= 3
	flow.reason = ctx->args[2];
#endif
#if KFREE_ARGS >= 4
	rx_sk = ctx->args[3];
#endif
	u16 ethertype = __builtin_bswap16(SKB(&skb, u16, protocol));
	u64 head = SKB(&skb, u64, head);
	if (SKB(&skb, u16, network_header))
		read_flow(&flow, head + SKB(&skb, u16, network_header), ethertype);
	fill_netns(key, at, &skb, dev, rx_sk);
	flow.iif = SKB(&skb, u32, skb_iif);
	read_conntrack(&flow, SKB(&skb, u64, _nfct));
	if (is_netfilter(flow.reason, flow.location)) {
		flow.hook = hook_of(ctx, &skb, dev, now);
#ifdef OFF_net_ct_stat
		flow.verdict = verdict_of(flow.net, now);
#endif
#ifdef KPROBES
		flow.verdict = probed_verdict(flow.verdict, at, flow.conntrack);
#endif
	}
	u64 packets = wire_packets(&skb), bytes = SKB(&skb, u32, len);
	if (!count_known(&flow, packets, bytes, now->side))
		count_unknown(ctx, at, &flow, &skb, rx_sk, packets, bytes, now);
	return 0;
}
