/* Who holds the connection table of one network namespace?
 *
 * Hook:    none. User space runs the program (BPF_PROG_TEST_RUN), which walks a part of the hash table each time.
 *          Before that, raw tracepoint kmem_cache_alloc for the moment in which user space makes a connection of its
 *          own: the table's address is told by no symbol on many kernels, but hash chains lead there from everywhere.
 * Counts:  connections by source, target, zone, protocol and state of TCP, in `lines`. Once there are `lines_max` of
 *          them, user space leaves those that others are to be folded into, and only lines without an address are made.
 * Cost:    printed by scripts/bench (table). No lock is taken, and one run makes STEPS steps at most.
 * Blind:   while a chain is walked, RCU keeps its entries what they are, connections, but not where they are: one that
 *          is freed and used again leads the walk into another chain. Then the rest of this chain is not seen, and some
 *          of the other counts twice; such chains are counted in `moved`. */

#define STEPS 256
/* A bucket is begun only where so many steps are left: chains that do not end within them are left to ctnetlink. */
#define CHAIN_MAX 128
/* So far a chain is followed to find the table. */
#define LOOK_MAX 1000
#define CANDIDATES 64

struct line_key {
	u8 source[16];
	u8 target[16];
	u16 zone;
	u8 protocol;
	u8 state;  /* enum tcp_conntrack; 255: none */
	u8 family; /* AF_INET, AF_INET6 */
	u8 has;	   /* HAS_SOURCE, HAS_TARGET: which of the addresses it is about; others are zero */
	u16 pad;
};
#define HAS_SOURCE 1
#define HAS_TARGET 2
#define NO_STATE 255

struct line_sum {
	u64 timeout_s;
	u32 entries;
	u32 unreplied;
	u32 weight; /* of a line that others are folded into: how many entries it had when that began */
	u32 pad;
};

struct walk {
	u64 base;	/* of the hash table: struct hlist_nulls_head[buckets] */
	u64 net;	/* struct net whose connections are counted; 0: to be found by its inode */
	u32 netns;	/* that inode */
	u32 buckets;
	u32 bucket;	/* to be walked next */
	u32 hz;		/* jiffies in a second */
	u32 lines;	/* made so far */
	u32 lines_max;	/* 0: no more lines are made */
	u32 moved;	/* chains that ended in another bucket's number */
	u32 thread;	/* whose allocations are remembered */
	u32 allocated;	/* of those, how many */
	u32 left;	/* jiffies that the connection found by look() has left */
};
_Static_assert(sizeof(struct line_key) == 40 && sizeof(struct line_sum) == 24 && sizeof(struct walk) == 56,
	       "walk.py has them otherwise");

#define TUPLES (OFF_nf_conn_tuplehash + OFF_nf_conntrack_tuple_hash_tuple)
#define REPLY_TUPLE (TUPLES + SIZE_nf_conntrack_tuple_hash)
#define NEXT (OFF_nf_conntrack_tuple_hash_hnnode + OFF_hlist_nulls_node_next)
#define PPREV (OFF_nf_conntrack_tuple_hash_hnnode + OFF_hlist_nulls_node_pprev)
/* The part of struct nf_conn that is fetched by one read. */
#define CT_BYTES ((OFF_nf_conn_proto_tcp_state + 8) & ~7)
_Static_assert(OFF_nf_conn_timeout < CT_BYTES && OFF_nf_conn_status < CT_BYTES && OFF_nf_conn_ct_net_net < CT_BYTES &&
	       OFF_nf_conn_tuplehash + 2 * SIZE_nf_conntrack_tuple_hash <= CT_BYTES, "nf_conn is laid out otherwise");
#ifdef OFF_nf_conn_zone
_Static_assert(OFF_nf_conn_zone + OFF_nf_conntrack_zone_dir < CT_BYTES, "nf_conn is laid out otherwise");
#endif

struct allocations {
	u64 at[CANDIDATES];
};

/* Here and not in registers or on the stack: what stands there the verifier tells apart at every step. */
struct fetched {
	u64 at; /* an odd pointer ends a chain, with the number of its bucket: <linux/list_nulls.h> */
	u64 entry[SIZE_nf_conntrack_tuple_hash / 8];
	u64 ct[CT_BYTES / 8];
	struct line_key key;
};

BPF_ARRAY(walks, struct walk, 1);
BPF_ARRAY(allocated, struct allocations, 1);
BPF_ARRAY(fetched, struct fetched, 1);
BPF_TABLE("hash", struct line_key, struct line_sum, lines, 16384);

/* What a run is asked for (its first argument, which at the tracepoint is an address), and its results. */
enum { WALK, LOOK, LOOK_BACK, REMEMBER_ME };
enum { GOES_ON, DONE, MANY_LINES, NOT_THERE, TOO_LONG };

/* enum ip_conntrack_status; in a flow table neither the time nor the state of TCP are kept. */
#define SEEN_REPLY (1 << 1)
#define OFFLOADED (1 << 14)
#define AT(from, type, offset) (*(type *)((u8 *)(from) + (offset)))

INLINE int remember(struct walk *walk, u64 at)
{
	u32 zero = 0, number;
	struct allocations *to;
	if ((u32)bpf_get_current_pid_tgid() != walk->thread)
		return 0;
	to = allocated.lookup(&zero);
	if (to) {
		number = walk->allocated++;
		to->at[number & (CANDIDATES - 1)] = at;
	}
	return 0;
}

/* Where the table begins, told by one direction of a connection that is the first of its chain; else nonsense. */
INLINE u64 base_by(u64 entry)
{
	u64 at = 0, next = 0;
	if (READ(&at, entry + PPREV) || READ(&next, entry + NEXT))
		return 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < LOOK_MAX && !(next & 1); i++)
		if (READ(&next, next + NEXT))
			return 0;
	return next & 1 ? at - 8 * (next >> 1) : 0;
}

/* Is this a connection of the namespace, and where is the table that one of its directions leads to? */
INLINE int look(struct walk *walk, u64 candidate, u64 direction)
{
	u64 net = 0, ct;
	u32 zero = 0, inode = 0, timeout = 0;
	struct allocations *of = allocated.lookup(&zero);
	if (!of)
		return NOT_THERE;
	ct = of->at[candidate & (CANDIDATES - 1)];
	if (READ(&net, ct + OFF_nf_conn_ct_net_net) || READ(&inode, net + OFF_net_ns_inum) || inode != walk->netns ||
	    READ(&timeout, ct + OFF_nf_conn_timeout))
		return NOT_THERE;
	walk->left = timeout - (u32)bpf_jiffies64();
	walk->base = base_by(ct + OFF_nf_conn_tuplehash + (direction ? SIZE_nf_conntrack_tuple_hash : 0));
	return is_kernel_address(walk->base) ? DONE : NOT_THERE;
}

/* What has no line of its own: the line with one of its addresses, that with none, or the one for whatever else. */
INLINE struct line_sum *folded(struct line_key *key)
{
	u64 *source = (u64 *)key->source, *target = (u64 *)key->target;
	u64 target_0 = target[0], target_1 = target[1];
	struct line_sum *from, *to, *sum, none = {};
	target[0] = target[1] = 0;
	key->has = HAS_SOURCE;
	from = lines.lookup(key);
	source[0] = source[1] = 0;
	target[0] = target_0;
	target[1] = target_1;
	key->has = HAS_TARGET;
	to = lines.lookup(key);
	if (from && (!to || from->weight >= to->weight))
		return from;
	if (to)
		return to;
	target[0] = target[1] = 0;
	key->has = key->family = 0;
	sum = lines.lookup(key);
	if (sum)
		return sum;
	lines.insert(key, &none);
	sum = lines.lookup(key);
	if (sum)
		return sum;
	key->zone = key->protocol = 0;
	key->state = NO_STATE;
	return lines.lookup(key);
}

/* The line that an entry of this key is added to. */
INLINE struct line_sum *line_of(struct walk *walk, struct line_key *key)
{
	struct line_sum none = {}, *sum = lines.lookup(key);
	if (sum)
		return sum;
	if (walk->lines_max) {
		lines.insert(key, &none);
		sum = lines.lookup(key);
		if (sum) {
			walk->lines++;
			return sum;
		}
	}
	return folded(key);
}

/* Add up a connection; ct is what was fetched of it. Like ctnetlink, leave out what has no time left. */
INLINE void count(struct walk *walk, struct fetched *to, u32 now)
{
	struct line_key *key = &to->key;
	struct line_sum *sum;
	u64 *ct = to->ct;
	u64 net = AT(ct, u64, OFF_nf_conn_ct_net_net);
	u32 inode = 0, hz = walk->hz;
	if ((int)(AT(ct, u32, OFF_nf_conn_timeout) - now) <= 0)
		return;
	if (!walk->net && !READ(&inode, net + OFF_net_ns_inum) && inode == walk->netns)
		walk->net = net;
	if (net != walk->net)
		return;
	__builtin_memset(key, 0, sizeof(*key));
	key->family = AT(ct, u8, TUPLES + OFF_nf_conntrack_tuple_src_l3num);
	key->protocol = AT(ct, u8, TUPLES + OFF_nf_conntrack_tuple_dst_protonum);
	key->has = HAS_SOURCE | HAS_TARGET;
	*(u32 *)key->source = AT(ct, u32, TUPLES + OFF_nf_conntrack_tuple_src_u3);
	*(u32 *)key->target = AT(ct, u32, REPLY_TUPLE + OFF_nf_conntrack_tuple_src_u3);
	if (key->family == 10) {
		__builtin_memcpy(key->source + 4, (u8 *)ct + TUPLES + OFF_nf_conntrack_tuple_src_u3 + 4, 12);
		__builtin_memcpy(key->target + 4, (u8 *)ct + REPLY_TUPLE + OFF_nf_conntrack_tuple_src_u3 + 4, 12);
	}
#ifdef OFF_nf_conn_zone
	if (AT(ct, u8, OFF_nf_conn_zone + OFF_nf_conntrack_zone_dir) & 1) /* of the original direction, or of both */
		key->zone = AT(ct, u16, OFF_nf_conn_zone + OFF_nf_conntrack_zone_id);
#endif
	key->state = NO_STATE;
	if (key->protocol == 6 && !(AT(ct, u64, OFF_nf_conn_status) & OFFLOADED))
		key->state = AT(ct, u8, OFF_nf_conn_proto_tcp_state);
	sum = line_of(walk, key);
	if (!sum)
		return;
	sum->entries++;
	if (!(AT(ct, u64, OFF_nf_conn_status) & SEEN_REPLY))
		sum->unreplied++;
	if (!(AT(ct, u64, OFF_nf_conn_status) & OFFLOADED))
		sum->timeout_s += (AT(ct, u32, OFF_nf_conn_timeout) - now) / hz;
}

/* Count whole chains from walk->bucket on. */
INLINE int walk_on(struct walk *walk)
{
	u32 zero = 0, now = bpf_jiffies64();
	struct fetched *to = fetched.lookup(&zero);
	if (!to)
		return NOT_THERE;
	to->at = 1;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < STEPS; i++) {
		if (to->at & 1) {
			if (i > STEPS - CHAIN_MAX || walk->bucket >= walk->buckets)
				break;
			if (READ(&to->at, walk->base + 8ull * walk->bucket))
				return NOT_THERE;
			if (to->at & 1 ? to->at >> 1 != walk->bucket : !is_kernel_address(to->at))
				return NOT_THERE;
			walk->bucket++;
			if (to->at & 1)
				continue;
		}
		if (READ(&to->entry, to->at - OFF_nf_conntrack_tuple_hash_hnnode))
			return NOT_THERE;
		/* Each connection is in the table by both its directions. */
		if (!AT(to->entry, u8, OFF_nf_conntrack_tuple_hash_tuple + OFF_nf_conntrack_tuple_dst_dir)) {
			if (READ(&to->ct, to->at - OFF_nf_conntrack_tuple_hash_hnnode - OFF_nf_conn_tuplehash))
				return NOT_THERE;
			count(walk, to, now);
		}
		to->at = AT(to->entry, u64, NEXT);
		if (to->at & 1 && to->at >> 1 != walk->bucket - 1)
			walk->moved++;
	}
	if (!(to->at & 1))
		return TOO_LONG;
	if (walk->bucket >= walk->buckets)
		return DONE;
	return walk->lines_max && walk->lines >= walk->lines_max ? MANY_LINES : GOES_ON;
}

int on_kmem_cache_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0;
	u64 asked = ctx->args[0], about = ctx->args[1];
	struct walk *walk = walks.lookup(&zero);
	if (!walk)
		return NOT_THERE;
	if (is_kernel_address(asked)) /* at the tracepoint: who allocates */
		return remember(walk, about);
	if (asked == REMEMBER_ME) { /* the number that this thread has outside of all containers */
		walk->thread = bpf_get_current_pid_tgid();
		return DONE;
	}
	return asked == WALK ? walk_on(walk) : look(walk, about, asked == LOOK_BACK);
}
