#!lua
-- A session as the primary holds it. KEYS: session. Returns data and the hash of the family part. It writes nothing, and is
-- no script that says so: a replica refuses it, so that a session which has not got there is not taken for one that ended.
return redis.call('HMGET', KEYS[1], 'data', 'family')
