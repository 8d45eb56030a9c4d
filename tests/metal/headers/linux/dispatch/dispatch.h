#pragma once
#ifdef __OBJC__
#include <objc/NSObject.h>
@protocol OS_dispatch_queue <NSObject>
@end
typedef NSObject<OS_dispatch_queue>* dispatch_queue_t;
typedef void (^dispatch_block_t)(void);
#ifdef __cplusplus
extern "C"
#endif
    void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block);
#else
typedef struct dispatch_queue_s* dispatch_queue_t;
#endif
