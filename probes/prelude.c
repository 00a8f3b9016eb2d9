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

INLINE int is_kernel_address(u64 at)
{
	return at >> 63;
}

/* Inode and cookie of a struct net. A pointer that was clobbered (sk_buff.dev shares its place with rbnode and
 * dev_scratch) leads to a number that no namespace has: then 0 is returned. */
INLINE int read_netns(struct tally *to, u64 net)
{
	if (READ(&to->netns, net + OFF_net_ns_inum) || to->netns < NETNS_INUM_MIN) {
		to->netns = 0; /* or what was read there would pass for an inode */
		return 0;
	}
#ifdef OFF_net_net_cookie
	READ(&to->netns_cookie, net + OFF_net_net_cookie);
#endif
	return 1;
}

/* The namespace a device is in, and the device's number in it. */
INLINE int read_device(struct drop_key *key, u64 dev, u8 from)
{
	u64 net = 0;
	u32 ifindex = 0;
#ifdef DEV_SIZE /* ifindex and nd_net stand near each other on this kernel */
	u64 words[DEV_SIZE / 8];
	if (!dev || READ(&words, dev + DEV_AT))
		return 0;
	net = *(u64 *)((u8 *)words + (OFF_net_device_nd_net_net - DEV_AT));
	ifindex = *(u32 *)((u8 *)words + (OFF_net_device_ifindex - DEV_AT));
#else
	if (!dev || READ(&net, dev + OFF_net_device_nd_net_net) || READ(&ifindex, dev + OFF_net_device_ifindex))
		return 0;
#endif
	if (!is_kernel_address(net))
		return 0;
	key->net = net;
	key->ifindex = ifindex;
	key->netns_from = from;
	return 1;
}

INLINE int read_socket(struct drop_key *key, u64 sk)
{
	u64 net = 0;
	if (!sk || READ(&net, sk + OFF_sock_common_skc_net_net) || !is_kernel_address(net))
		return 0;
	key->net = net;
	key->netns_from = NETNS_FROM_SOCKET;
	return 1;
}

/* The namespace by the device, else by the socket, the route or the connection. Which one it is (inode, cookie)
 * is read only where the key is not counted yet in this turn. */
INLINE void fill_netns(struct drop_key *key, u64 at, struct skb_view *skb, u64 dev, u64 rx_sk)
{
	u64 sk = 0, out = 0, net = 0, dst = SKB(skb, u64, _skb_refdst) & ~1ull, ct = SKB(skb, u64, _nfct) & ~7ull;
	key->net = 0;
	key->ifindex = key->netns_from = 0;
	if (read_device(key, dev, NETNS_FROM_DEVICE))
		return;
	if (key->family == 0 || read_socket(key, rx_sk))
		return;
	if (!READ(&sk, at + OFF_sk_buff_sk) && read_socket(key, sk))
		return;
	if (dst && !READ(&out, dst + OFF_dst_entry_dev) && read_device(key, out, NETNS_FROM_ROUTE))
		return;
#ifdef OFF_nf_conn_ct_net_net
	if (ct && !READ(&net, ct + OFF_nf_conn_ct_net_net) && is_kernel_address(net)) {
		key->net = net;
		key->netns_from = NETNS_FROM_CONNTRACK;
	}
#endif
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

INLINE u8 segment_of(u8 flags)
{
	if (flags & 4)
		return SEGMENT_RST;
	if (flags & 2)
		return flags & 16 ? SEGMENT_SYN_ACK : SEGMENT_SYN;
	return flags & 1 ? SEGMENT_FIN : SEGMENT_OTHER;
}

/* Family, protocol, addresses, ports and TCP flags of the packet whose network header is at l3. */
INLINE void read_flow(struct flow_key *flow, u64 l3, u16 ethertype)
{
	u64 words[7];
	u8 *h = (u8 *)words, protocol;
	u32 transport;
	if (bpf_probe_read_kernel(words, 56, (const void *)l3))
		return;
	if (ethertype == ETHERTYPE_IPV4 && h[0] >> 4 == 4) {
		flow->family = 2;
		protocol = h[9];
		/* Whole words, as the hash reads them: bytes put together again cost as much as a read. */
		u32 *src = (u32 *)flow->src, *dst = (u32 *)flow->dst;
		src[2] = dst[2] = 0xffff0000;
		src[3] = *(u32 *)(h + 12);
		dst[3] = *(u32 *)(h + 16);
		transport = (be16(h + 6) & 0x1fff) ? 0 : (h[0] & 15) * 4;
		if (transport == 20) {
			__builtin_memcpy(h + 40, h + 20, 4);
			h[53] = h[33];
		}
	} else if (ethertype == ETHERTYPE_IPV6 && h[0] >> 4 == 6) {
		flow->family = 10;
		protocol = h[6];
		__builtin_memcpy(flow->src, h + 8, 16);
		__builtin_memcpy(flow->dst, h + 24, 16);
		transport = ipv6_transport(l3, &protocol);
		if (transport == 40)
			transport = 20; /* as above: the ports are in h[40..43], the flags in h[53] */
		else if (transport == 20)
			transport = 0;
	} else {
		return;
	}
	flow->protocol = protocol;
	if (!transport || !has_ports(protocol))
		return;
	if (transport != 20)
		bpf_probe_read_kernel(h + 40, 16, (const void *)(l3 + transport));
	u32 ports = __builtin_bswap32(*(u32 *)(h + 40));
	*(u32 *)&flow->sport = ports << 16 | ports >> 16; /* sport, dport side by side */
	if (protocol == 6)
		flow->segment = segment_of(h[53]);
}

/* Where the headers end, seen from the network header: after the transport header, inside a VXLAN tunnel after
 * the inner one. Nothing beyond it is ever read. */
INLINE u32 headers_end(u64 l3, u8 protocol, u32 transport)
{
	u8 h[16];
	u32 inner;
	if (READ(&h, l3 + transport))
		return transport;
	if (protocol == 6)
		return transport + (h[12] >> 4) * 4;
	if (protocol != 17 || (be16(h + 2) != 4789 && be16(h + 2) != 8472))
		return protocol == 17 || protocol == 1 || protocol == 58 ? transport + 8 : transport;
	inner = transport + 8 + 8 + 14;
	if (READ(&h, l3 + inner) || h[0] >> 4 != 4)
		return inner;
	transport = inner + (h[0] & 15) * 4;
	protocol = h[9];
	if (READ(&h, l3 + transport))
		return transport;
	return protocol == 6 ? transport + (h[12] >> 4) * 4 : transport + (protocol == 17 || protocol == 1 ? 8 : 0);
}

#ifdef OFF_nf_conn_tuplehash
/* Addresses and ports of a struct nf_conntrack_tuple. */
INLINE void read_tuple(u64 at, u8 family, u8 protocol, u8 *src, u8 *dst, u16 *sport, u16 *dport)
{
	if (family == 2) {
		*(u32 *)(src + 8) = *(u32 *)(dst + 8) = 0xffff0000;
		READ((u32 *)(src + 12), at + OFF_nf_conntrack_tuple_src_u3);
		READ((u32 *)(dst + 12), at + OFF_nf_conntrack_tuple_dst_u3);
	} else {
		bpf_probe_read_kernel(src, 16, (const void *)(at + OFF_nf_conntrack_tuple_src_u3));
		bpf_probe_read_kernel(dst, 16, (const void *)(at + OFF_nf_conntrack_tuple_dst_u3));
	}
	if (has_ports(protocol)) {
		READ(sport, at + OFF_nf_conntrack_tuple_src_u);
		READ(dport, at + OFF_nf_conntrack_tuple_dst_u);
		*sport = __builtin_bswap16(*sport);
		*dport = __builtin_bswap16(*dport);
	}
}
#endif

/* What the packet's connection was to conntrack when it died. Translation is seen through: the flow becomes the one
 * that was sent, whatever the headers say by now, and beside it stands the one its reply would be. */
INLINE void read_conntrack(struct flow_key *flow, u64 nfct)
{
	u64 status = 0, ct = nfct & ~7ull;
	if ((nfct & 7) == 7) {
		flow->conntrack = CONNTRACK_UNTRACKED;
		return;
	}
	if (!ct)
		return;
	flow->conntrack = CONNTRACK_UNKNOWN;
#ifdef OFF_nf_conn_status
	if (READ(&status, ct + OFF_nf_conn_status))
		return;
	flow->conntrack = status & 8 /* IPS_CONFIRMED */ ? CONNTRACK_CONFIRMED : CONNTRACK_NEW;
#ifdef OFF_nf_conn_tuplehash
	flow->nat = status >> 4 & 3; /* IPS_SRC_NAT, IPS_DST_NAT */
	if (!flow->nat || !flow->family)
		return;
	u64 original = ct + OFF_nf_conn_tuplehash + OFF_nf_conntrack_tuple_hash_tuple;
	u64 reply = original + SIZE_nf_conntrack_tuple_hash;
	int is_reply = (nfct & 7) >= 3; /* IP_CT_IS_REPLY */
	if (is_reply)
		flow->nat |= NAT_REPLY;
	read_tuple(is_reply ? reply : original, flow->family, flow->protocol, flow->src, flow->dst,
		   &flow->sport, &flow->dport);
	read_tuple(is_reply ? original : reply, flow->family, flow->protocol, flow->reply_src, flow->reply_dst,
		   &flow->reply_sport, &flow->reply_dport);
#endif
#endif
}

/* Packets on the wire that a buffer stands for: its segments, kept behind the linear data, or one. */
INLINE u32 wire_packets(struct skb_view *skb)
{
	u16 segments = 0;
	READ(&segments, SKB(skb, u64, head) + SKB(skb, u32, end) + OFF_skb_shared_info_gso_segs);
	return segments ? segments : 1;
}
