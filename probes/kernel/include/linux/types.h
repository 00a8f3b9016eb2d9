/* SPDX-License-Identifier: Apache-2.0 */
/* The fixed-width integer names that BCC's own headers and our probes are written in; nothing else. */
#ifndef K8SDIAG_LINUX_TYPES_H
#define K8SDIAG_LINUX_TYPES_H

typedef signed char s8;
typedef unsigned char u8;
typedef short s16;
typedef unsigned short u16;
typedef int s32;
typedef unsigned int u32;
typedef long long s64;
typedef unsigned long long u64;

typedef s8 __s8;
typedef u8 __u8;
typedef s16 __s16;
typedef u16 __u16;
typedef s32 __s32;
typedef u32 __u32;
typedef s64 __s64;
typedef u64 __u64;

typedef u16 __be16;
typedef u32 __be32;

/* From the compiler, so that they are right for the target it compiles for. */
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;

#define __aligned_u64 u64 __attribute__((aligned(8)))

/* A macro, not a typedef: bool is a keyword from C23 on. */
#define bool _Bool

#endif
