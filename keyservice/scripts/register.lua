-- Say which keeper will have a region's seat, on a server that has no trust log yet. KEYS: meta, region. ARGV: keeper_id.
-- Returns {"registered"}, or {"exists"} if there is a trust log by now.
local replid, refusal = master_replid()
if not replid then
  return refusal
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'exists'}
end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'keeper_id', ARGV[1], 'empty', '1', 'at', server_ms())
return {'registered'}
