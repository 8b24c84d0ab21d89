-- Put one client in place of what the caller read, or delete it. KEYS: clients, revision. ARGV: client id, what must be
-- there now ('' for nothing), what is to be there ('' for nothing), a new revision, the most clients there may be.
-- Returns done, changed (something else is there) or full.
local held = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if held ~= ARGV[2] then
  return 'changed'
end
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
elseif held == '' and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[5]) then
  return 'full'
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
redis.call('SET', KEYS[2], ARGV[4])
return 'done'
