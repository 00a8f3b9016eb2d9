/* Plumbing in front of every probe: reads of kernel memory at offsets taken from BTF (-DOFF_struct_member),
 * the pairs of maps that user space switches between, budgets and losses.
 *
 * Only raw helper calls and maps are used, so that BCC has nothing to rewrite and this ports to libbpf. */
#include "wire.h"

#define INLINE static inline __attribute__((always_inline))
#define READ(dst, at) bpf_probe_read_kernel((dst), sizeof(*(dst)), (const void *)(at))
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86DD
/* Inodes of namespaces are given from here on (PROC_DYNAMIC_FIRST; the initial ones from a little below). */
#define NETNS_INUM_MIN 0xEFFFFF00u

BPF_ARRAY(control, struct control, 1);
BPF_PERCPU_ARRAY(budget, struct budget, 1);
BPF_PERCPU_ARRAY(losses, u64, 4);

/* The part of sk_buff that a probe needs, fetched by one read: a read costs more than the bytes it moves. */
struct skb_view {
	u64 words[SKB_SIZE / 8];
};
#define SKB(view, type, member) (*(type *)((u8 *)(view) + (OFF_sk_buff_##member - SKB_AT)))

INLINE void count_loss(u32 which)
{
	u64 *lost = losses.lookup(&which);
	if (lost)
		*lost += 1;
}

/* The budget of this CPU, renewed when user space has switched the maps since it was last used. */
INLINE struct budget *current_budget(struct control *control)
{
	u32 zero = 0;
	struct budget *b = budget.lookup(&zero);
	if (b && b->turn != control->turn) {
		b->turn = control->turn;
		b->samples = b->stacks = b->flows_full = 0;
	}
	return b;
}

/* Fill in inode and cookie of a struct net. A pointer that was clobbered (sk_buff.dev shares its place with
 * rbnode and dev_scratch) gives a number that no namespace has: then nothing is filled in. */
INLINE int read_netns(struct drop_key *key, u64 net, u8 from)
{
	u32 inum = 0;
	if (READ(&inum, net + OFF_net_ns_inum) || inum < NETNS_INUM_MIN)
		return 0;
	key->netns = inum;
	key->netns_from = from;
#ifdef OFF_net_net_cookie
	READ(&key->netns_cookie, net + OFF_net_net_cookie);
#endif
	return 1;
}

INLINE int read_device(struct drop_key *key, u64 dev, u8 from)
{
#ifdef DEV_SIZE /* ifindex and nd_net stand near each other on this kernel */
	u64 words[DEV_SIZE / 8];
	if (!dev || READ(&words, dev + DEV_AT))
		return 0;
	u64 net = *(u64 *)((u8 *)words + (OFF_net_device_nd_net_net - DEV_AT));
	u32 ifindex = *(u32 *)((u8 *)words + (OFF_net_device_ifindex - DEV_AT));
#else
	u64 net = 0;
	u32 ifindex = 0;
	if (!dev || READ(&net, dev + OFF_net_device_nd_net_net) || READ(&ifindex, dev + OFF_net_device_ifindex))
		return 0;
#endif
	if (!read_netns(key, net, from))
		return 0;
	key->ifindex = ifindex;
	return 1;
}

INLINE int read_socket(struct drop_key *key, u64 sk)
{
	u64 net = 0;
	return sk && !READ(&net, sk + OFF_sock_common_skc_net_net) && read_netns(key, net, NETNS_FROM_SOCKET);
}

INLINE u16 be16(const u8 *at)
{
	return (u16)at[0] << 8 | at[1];
}

INLINE int has_ports(u8 protocol)
{
	return protocol == 6 || protocol == 17 || protocol == 132 || protocol == 136 || protocol == 33;
}

/* Step over IPv6 extension headers: returns the offset of the transport header, or 0 for a later fragment. */
INLINE u32 ipv6_transport(u64 l3, u8 *protocol)
{
	u32 at = 40;
#pragma unroll
	for (int i = 0; i < 4; i++) {
		u8 next[4] = {};
		u8 kind = *protocol;
		if (kind != 0 && kind != 43 && kind != 44 && kind != 60)
			break;
		READ(&next, l3 + at);
		*protocol = next[0];
		if (kind == 44) {
			if (be16(next + 2) >> 3)
				return 0;
			at += 8;
		} else {
			at += 8 + next[1] * 8;
		}
	}
	return at;
}

/* Family, protocol, addresses and ports of the packet whose network header is at l3. */
INLINE void read_flow(struct flow_key *flow, u64 l3, u16 ethertype)
{
	u8 h[44];
	u32 transport;
	if (READ(&h, l3))
		return;
	if (ethertype == ETHERTYPE_IPV4 && h[0] >> 4 == 4) {
		flow->family = 2;
		flow->protocol = h[9];
		flow->src[10] = flow->src[11] = flow->dst[10] = flow->dst[11] = 0xff;
		__builtin_memcpy(flow->src + 12, h + 12, 4);
		__builtin_memcpy(flow->dst + 12, h + 16, 4);
		transport = (be16(h + 6) & 0x1fff) ? 0 : (h[0] & 15) * 4;
		if (transport == 20)
			__builtin_memcpy(h + 40, h + 20, 4);
	} else if (ethertype == ETHERTYPE_IPV6 && h[0] >> 4 == 6) {
		flow->family = 10;
		flow->protocol = h[6];
		__builtin_memcpy(flow->src, h + 8, 16);
		__builtin_memcpy(flow->dst, h + 24, 16);
		transport = ipv6_transport(l3, &flow->protocol);
		if (transport == 40)
			transport = 20; /* as above: the ports are in h[40..43] */
		else if (transport == 20)
			transport = 0;
	} else {
		return;
	}
	if (!transport || !has_ports(flow->protocol))
		return;
	if (transport != 20)
		bpf_probe_read_kernel(h + 40, 4, (const void *)(l3 + transport));
	flow->sport = be16(h + 40);
	flow->dport = be16(h + 42);
}
